"""Fidelity: how close sketched attention comes to exact attention, per layer and head, on a text and an encoder.

Figures of the attention output, for every layer, head, length and method: its relative error in the Frobenius and in
the spectral norm, and the mean cosine of its rows to the exact ones. Of the whole encoder, with the sketch on every
layer: the cosine of the mean final hidden state to that of exact attention. Two oracles, which need n² time, say what
can be hoped for and what a fixed pattern gives: the true top keys of every row, and a window with CLS.

    python scripts/benchmark_fidelity.py --text text.txt --documents reviews.zip --output benchmarks/results/fidelity

What is done is kept; the same command again continues after an interruption.
"""

import argparse
import dataclasses
import functools
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _benchmark import (
    DTYPES,
    LayerInputs,
    add_settings,
    capture_layers,
    describe,
    embed,
    exact_attention,
    find_minilm,
    first_tokens,
    format_table,
    frobenius_error,
    load_encoder,
    make_parser,
    new_figure,
    number,
    over_lengths,
    read_documents,
    save_figure,
    sketch,
    start,
    use_attention,
)
from _record import ResumableRecord
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from hf_skein import SkeinConfig


COLUMNS = (64, 128, 256)
WINDOW = 256  # keys around a query
LOGITS_PER_STEP = 2**24  # of the oracles

FIGURES = {
    "frobenius": "Relative Frobenius error of the attention output, mean over heads and layers",
    "spectral": "Relative spectral error of the attention output, mean over heads and layers",
    "token_cosine": "Cosine of the rows of the attention output, mean over rows, heads and layers",
    "document_cosine": "Cosine of the document's mean final hidden state, the method on every layer",
}


def make_methods(args: argparse.Namespace) -> dict[str, SkeinConfig]:
    """The configurations to be measured, by name."""
    if args.settings == "none":
        return dict(args.setting)
    adaptive = SkeinConfig(min_length=0, method="adaptive", block_size=64, max_blocks=256, num_columns=256)
    paper = SkeinConfig(min_length=0, method="skeinformer", num_columns=256)  # and as many pilots
    methods = {"V-Mean": SkeinConfig(min_length=0, method="vmean"), "default": SkeinConfig(min_length=0)}
    for config in (paper, *(dataclasses.replace(adaptive, block_size=size) for size in (64, 128, 256, 512))):
        for columns in COLUMNS:
            one = dataclasses.replace(config, num_columns=columns)
            methods[describe(one)] = one
    variants = {
        "uniform columns": {"column_sampling": "uniform"},
        "true row sums": {"row_normalization": "none"},
        "simple row normalization": {"row_normalization": "simple"},
        "no pilot reutilization": {"pilot_reutilization": False},
        "mean residual": {"residual": "mean"},
        "second-order residual": {"residual": "second_order"},
    }
    for name, fields in variants.items():
        methods[f"{describe(paper)}, {name}"] = dataclasses.replace(paper, **fields)
    ablations = {
        "4 pilots": {"num_pilots": 4},
        "mean residual": {"residual": "mean"},
        "no residual": {"row_normalization": "simple"},
        "uniform columns": {"column_sampling": "uniform"},
        "one block": {"max_blocks": 1},
        "no exact rows": {"exact_rows": 0},
        "1 stratum": {"num_strata": 1},
        **{f"{strata} strata": {"num_strata": strata} for strata in (16, 32, 128)},
    }
    for name, fields in ablations.items():
        methods[f"default, {name}"] = SkeinConfig(min_length=0, **fields)
    for one in (dataclasses.replace(adaptive, num_strata=1), dataclasses.replace(adaptive, num_columns=192)):
        methods[describe(one)] = one
    return methods | dict(args.setting)


def oracles(inputs: LayerInputs) -> dict[str, Tensor]:
    """What needs all logits: the rest dropped, attention to each row's true top keys, and to a window and CLS.

    The first query (CLS) attends to everything in the window pattern, as Longformer's global tokens do.

    Returns:
        Outputs `[heads, n, p]` by name.
    """
    query, key, value, scale = inputs
    heads, n, _ = query.shape
    position = torch.arange(n, device=query.device)
    counts = [columns for columns in COLUMNS if columns < n]
    outputs: dict[str, list[Tensor]] = {}
    for rows in position.split(max(1, LOGITS_PER_STEP // (heads * n))):
        logits = scale * query[:, rows] @ key.mT
        offset = position - rows[:, None]
        seen = (offset >= -WINDOW // 2) & (offset < WINDOW // 2) | (position == 0) | (rows[:, None] == 0)
        kept = {f"window of {WINDOW} and CLS": seen}
        if counts:
            top = logits.topk(max(counts), sorted=True).values
            kept |= {f"oracle, {columns} columns": logits >= top[..., columns - 1, None] for columns in counts}
        for name, mask in kept.items():
            output = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value
            outputs.setdefault(name, []).append(output)
    return {name: torch.cat(parts, 1) for name, parts in outputs.items()}


def spectral_norm(x: Tensor) -> Tensor:
    """Largest singular value of every head: `[heads, n, p]` to `[heads]`."""
    x = x.double()
    return torch.linalg.eigvalsh(x.mT @ x)[..., -1].clamp_min(0).sqrt()


@torch.no_grad()
def attention_rows(args: argparse.Namespace, methods: dict[str, SkeinConfig], length: int) -> list[dict[str, Any]]:
    """One row per layer and method, with the figures of every head."""
    model, tokenizer = load_encoder(args.model, length, args.positions, args.random_weights, args.device)
    ids = first_tokens(tokenizer, args.text.read_text(encoding="utf-8"), length)
    result = []
    layers = capture_layers(model, ids, args.layers)
    progress = tqdm(total=len(layers) * len(methods), desc=f"{length} tokens, layers", leave=False)
    for layer, inputs in sorted(layers.items()):
        inputs = LayerInputs(*(x.to(DTYPES[args.dtype]) for x in inputs[:3]), inputs.scale)
        exact = exact_attention(inputs)
        sketches = ((name, sketch(inputs, config, layer)) for name, config in methods.items())
        for name, output in itertools.chain(sketches, oracles(inputs).items()):
            figures = {
                "frobenius": frobenius_error(output, exact),
                "spectral": spectral_norm(output - exact) / spectral_norm(exact),
                "token_cosine": F.cosine_similarity(output, exact, dim=-1).mean(-1),
            }
            figures = {figure: [float(f"{x:.5g}") for x in values.tolist()] for figure, values in figures.items()}
            result.append({"of": "attention", "n": length, "layer": layer, "method": name, **figures})
            progress.update(name in methods)
    progress.close()
    return result


def document_rows(
    args: argparse.Namespace, methods: dict[str, SkeinConfig], length: int, texts: list[str], of: str
) -> list[dict[str, Any]]:
    """One row per method: the cosine of each document's mean final hidden state to that of exact attention."""
    model, tokenizer = load_encoder(args.model, length, args.positions, args.random_weights, args.device)
    if of == "document":
        documents = first_tokens(tokenizer, texts[0], length).tolist()
    else:
        documents = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    use_attention(model, None)
    exact = embed(model, tokenizer, documents)
    result = []
    for name, config in tqdm(methods.items(), desc=f"{length} tokens, {of}", leave=False):
        use_attention(model, config)
        cosines = F.cosine_similarity(embed(model, tokenizer, documents), exact, dim=-1)
        figures = {"document_cosine": cosines.mean().item(), "cosines": [float(f"{x:.6g}") for x in cosines.tolist()]}
        result.append({"of": of, "n": length, "method": name, **figures})
    return result


def long_documents(args: argparse.Namespace) -> list[str]:
    """`--num-documents` documents, evenly taken from all those of at least `--document-length` tokens."""
    texts = read_documents(args.documents)["text"]
    tokenizer = AutoTokenizer.from_pretrained(args.model or find_minilm())
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    long = [i for i, tokens in enumerate(ids) if len(tokens) >= args.document_length]
    if len(long) < args.num_documents:
        raise SystemExit(
            f"error: {len(long)} of {len(texts)} documents have {args.document_length} tokens; --num-documents is "
            f"{args.num_documents}."
        )
    return [texts[long[i * len(long) // args.num_documents]] for i in range(args.num_documents)]


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Means over heads and layers, as `[figure][method][where]`: where is the length, or `documents`."""
    collected: dict[str, dict[str, dict[str, list[float]]]] = {figure: {} for figure in FIGURES}
    for row in rows:
        where = "documents" if row["of"] == "documents" else str(row["n"])
        for figure in FIGURES.keys() & row.keys():
            values = collected[figure].setdefault(row["method"], {}).setdefault(where, [])
            values += row[figure] if isinstance(row[figure], list) else [row[figure]]
    return {
        figure: {method: {where: float(np.mean(x)) for where, x in by.items()} for method, by in methods.items()}
        for figure, methods in collected.items()
    }


def print_summary(summary: dict[str, dict[str, dict[str, float]]]) -> None:
    """A table per figure: methods by lengths."""
    for figure, title in FIGURES.items():
        places = list(dict.fromkeys(where for by in summary[figure].values() for where in by))
        rows = [["", *places]]
        for method, by in summary[figure].items():
            rows.append([method, *(number(by.get(where), ".4f") for where in places)])
        print(format_table(title, rows), flush=True)


def plot(record: dict[str, Any], output: Path) -> None:
    """Left: error against columns at the longest length. Right: error against the length."""
    figure, ((left, right),) = new_figure(2)
    errors, lengths = record["summary"]["frobenius"], record["lengths"]
    families: dict[str, dict[int, str]] = {}  # of methods that differ in their columns only
    for method in errors:
        match = re.fullmatch(r"(.*), (\d+) columns", method)
        family, columns = (match[1], int(match[2])) if match else (method, 0)
        families.setdefault(family, {})[columns] = method
    for family, by_columns in families.items():
        if max(by_columns) == 0 and re.search("columns|^default, ", family):
            continue  # an ablation, in the table only
        points = sorted((columns, errors[method].get(str(lengths[-1]))) for columns, method in by_columns.items())
        if len(points) > 1:
            left.plot(*zip(*points, strict=True), marker="o", markersize=4, label=family)
        best = by_columns[max(by_columns)]
        values = [errors[best].get(str(n)) for n in lengths]
        right.plot(lengths, values, marker="o", markersize=4, label=best)
    columns = sorted({columns for by_columns in families.values() for columns in by_columns if columns})
    left.set(xscale="log", xlabel="columns", ylabel="relative Frobenius error", title=f"{lengths[-1]} tokens")
    left.set_xticks(columns, [str(x) for x in columns])
    left.minorticks_off()
    left.grid(alpha=0.3)
    over_lengths(right, lengths, ylabel="relative Frobenius error")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(fontsize=7)
    weights = " (random weights)" if record["random_weights"] else ""
    layers = ", ".join(map(str, record["layers"]))
    save_figure(figure, f"Attention of {record['model']}{weights} on text, layers {layers}", record, output)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and returns its record."""
    parser = make_parser(__doc__, [512, 2048, 4096])
    add_settings(parser, ["table"], "table")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of attention alone")
    parser.add_argument("--positions", choices=("tile", "interpolate"), default="tile", help="default %(default)s")
    parser.add_argument("--random-weights", action="store_true", help="the model's architecture, not its weights")
    parser.add_argument("--documents", type=Path, help="a folder or zip file of labelled texts, for document cosines")
    parser.add_argument("--num-documents", type=int, default=24, metavar="N", help="default %(default)s")
    parser.add_argument("--document-length", type=int, default=512, metavar="N", help="default %(default)s tokens")
    args = parser.parse_args(argv)
    args.lengths.sort()

    methods = make_methods(args)
    header = start(args, __file__)
    header |= {"methods": {name: config.to_dict() for name, config in methods.items()}}
    record = ResumableRecord(args.output, header, ("lengths",))
    for length in args.lengths:
        record.part(f"attention, {length}", functools.partial(attention_rows, args, methods, length))
        texts = [args.text.read_text(encoding="utf-8")]
        record.part(f"document, {length}", functools.partial(document_rows, args, methods, length, texts, "document"))
    if args.documents:
        length, texts = args.document_length, long_documents(args)
        record.part("documents", functools.partial(document_rows, args, methods, length, texts, "documents"))
    result = record.finish(summary=summarise(record.rows))
    print_summary(result["summary"])
    plot(result, args.output)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
