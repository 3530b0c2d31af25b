"""What those ingredients of `method="adaptive"` are worth that no setting turns off: the error with each replaced.

The relative Frobenius error of the attention output on the layers of an encoder on a text, as benchmark_fidelity.py has
it (and the ablations that are settings). One ingredient at a time is replaced by what the paper's framework has, or by
nothing; the rest is the default.

    python scripts/ablate_adaptive.py --text text.txt --output benchmarks/results/ablations
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from _benchmark import (
    capture_layers,
    exact_attention,
    first_tokens,
    format_table,
    frobenius_error,
    load_encoder,
    make_parser,
    new_figure,
    save_figure,
    sketch,
    start,
)
from _record import ResumableRecord
from torch import Tensor
from tqdm import tqdm

from hf_skein import SkeinConfig
from hf_skein.sketch import adaptive, columns, pilots, routing
from hf_skein.sketch.gather import gather_rows
from hf_skein.sketch.random import gumbel


# What stands in for an ingredient


def in_order(query: Tensor, key: Tensor, components: int) -> Tensor:
    """In place of the components of the logits, the position: blocks of consecutive queries."""
    heads, n, _ = query.shape
    return torch.arange(n, dtype=query.dtype, device=query.device).expand(heads, n)[..., None]


def random_query(query: Tensor, blocks: routing.Blocks, num_pilots: int) -> pilots.Pilots:
    """In place of the mean query of a block, one of its queries, drawn uniformly; without a spread."""
    lengths = blocks.filled.sum(-1)  # [blocks]
    drawn = (torch.rand(blocks.index.shape[:2], device=query.device) * lengths).long()
    rows = gather_rows(query, blocks.index.gather(-1, drawn[..., None]))
    return pilots.Pilots(rows, query.new_zeros(len(query), query.shape[-1], query.shape[-1]))


def without_spread(query: Tensor, blocks: routing.Blocks, num_pilots: int) -> pilots.Pilots:
    """The mean query of a block, as if all its queries were that."""
    found = pilots.block_pilots(query, blocks, num_pilots)
    return found._replace(covariance=torch.zeros_like(found.covariance))


def drawn(score: Tensor, count: int) -> Tensor:
    """In place of the highest scores, columns drawn without replacement with probabilities in proportion to them."""
    return columns.top_columns(score + gumbel(torch.rand_like(score)), count)


class Replacement(NamedTuple):
    """A function of a module, and what takes its place."""

    module: Any
    name: str
    function: Callable


VARIANTS: dict[str, Replacement | None] = {
    "default": None,
    "blocks of consecutive queries, no routing": Replacement(routing, "logit_components", in_order),
    "one random query for a block, not their mean": Replacement(adaptive, "block_pilots", random_query),
    "mean query without the spread": Replacement(adaptive, "block_pilots", without_spread),
    "columns drawn, not the highest scores": Replacement(adaptive, "top_columns", drawn),
    "norms of values not centred": Replacement(
        adaptive, "log_value_norm", lambda value, center: columns.log_value_norm(value, center=False)
    ),
}


# Measurement


@torch.no_grad()
def error_rows(args: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """One row per layer and variant, with the error of every head."""
    model, tokenizer = load_encoder(args.model, length, device=args.device)
    ids = first_tokens(tokenizer, args.text.read_text(encoding="utf-8"), length)
    rows = []
    for layer, inputs in sorted(capture_layers(model, ids, args.layers).items()):
        exact = exact_attention(inputs)
        for name, replacement in tqdm(VARIANTS.items(), desc=f"{length} tokens, layer {layer}", leave=False):
            torch.manual_seed(0)
            replaced = mock.patch.object(*replacement) if replacement else contextlib.nullcontext()
            with replaced:
                error = frobenius_error(sketch(inputs, SkeinConfig(min_length=0), layer), exact)
            errors = [float(f"{x:.5g}") for x in error.tolist()]
            rows.append({"n": length, "layer": layer, "variant": name, "frobenius": errors})
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean error over heads and layers, as `[variant][length]`."""
    return {
        name: {
            str(n): float(np.mean([row["frobenius"] for row in rows if (row["variant"], row["n"]) == (name, n)]))
            for n in dict.fromkeys(row["n"] for row in rows)
        }
        for name in VARIANTS
    }


def plot(record: dict[str, Any], output: Path) -> None:
    """A bar per variant and length."""
    figure, ((axis,),) = new_figure(1)
    lengths, height = record["lengths"], 0.8 / len(record["lengths"])
    for i, n in enumerate(lengths):
        at = np.arange(len(VARIANTS)) + (i - (len(lengths) - 1) / 2) * height
        axis.barh(at, [errors[str(n)] for errors in record["summary"].values()], height, label=f"{n} tokens")
    axis.set_yticks(range(len(VARIANTS)), record["summary"], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="relative Frobenius error")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(lengths))
    save_figure(figure, f"Ingredients of adaptive attention, {record['model']}", record, output)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the ablations and returns their record."""
    args = make_parser(__doc__, [512, 2048, 4096]).parse_args(argv)
    args.lengths.sort()
    record = ResumableRecord(args.output, start(args, __file__))
    for length in args.lengths:
        record.part(str(length), functools.partial(error_rows, args, length))
    result = record.finish(summary=summarise(record.rows))
    body = [[name, *(f"{errors[str(n)]:.4f}" for n in args.lengths)] for name, errors in result["summary"].items()]
    print(format_table("Relative Frobenius error", [["tokens", *map(str, args.lengths)], *body]))
    plot(result, args.output)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
