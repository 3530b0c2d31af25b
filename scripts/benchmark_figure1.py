"""Figure 1 of the paper, with more methods: error against the number of features, and against time.

The relative spectral error of the attention output, `‖R - BV‖₂ / ‖BV‖₂`, for every head of some layers of an encoder on
some pieces of a text, with its weights and with random ones; mean and standard error over all of them. Random
numbers are drawn anew for every layer and piece. And the time of one layer, all methods side by side. A method's
features are what its cost is linear in: see
`hf_skein.baselines.baseline_attention`; of `adaptive` they are the keys per query, two thirds columns and one third
strata, as in the default.

    python scripts/benchmark_figure1.py --text text.txt --threads 1 --output benchmarks/results/figure1

What is done is kept; the same command again continues after an interruption.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _benchmark import (
    LayerInputs,
    capture_layers,
    compare_costs,
    exact_attention,
    first_tokens,
    format_table,
    load_encoder,
    make_parser,
    new_figure,
    number,
    save_figure,
    sketch,
    start,
)
from _record import ResumableRecord
from benchmark_fidelity import spectral_norm
from torch import Tensor
from tqdm import tqdm

from hf_skein import SkeinConfig
from hf_skein.baselines import NAMES, baseline_attention


WEIGHTS = ("pretrained", "random")
SEEDS_PER_TEXT = 1000  # more than there are layers
OURS = {
    "skeinformer": {"method": "skeinformer"},
    "adaptive": {},
    "adaptive, blocks of 64": {"max_blocks": 256},
}
# Without padding the two Informers are the same.
METHODS = (*(name for name in NAMES if name != "informer-unmasked"), *OURS)


def attend(method: str, features: int, inputs: LayerInputs, layer: int, seed: int = 0) -> Tensor:
    """Attention output `[heads, n, p]` of a method."""
    if method in OURS:
        fields = {**OURS[method], "seed": seed}
        if fields.get("method") != "skeinformer":
            fields["num_strata"] = features // 3
        columns = features - fields.get("num_strata", 0)
        return sketch(inputs, SkeinConfig(min_length=0, num_columns=columns, **fields), layer)
    query, key, value = (x[None] for x in inputs[:3])
    config = SkeinConfig(min_length=0, num_columns=features, seed=seed)
    return baseline_attention(query, key, value, scaling=inputs.scale, config=config, method=method, layer=layer)[0]


def layers_of(args: argparse.Namespace, weights: str, length: int, piece: int) -> dict[int, LayerInputs]:
    """Inputs of the attention layers for one piece of the text."""
    model, tokenizer = load_encoder(args.model, length, random_weights=weights == "random", device=args.device)
    text = args.text.read_text(encoding="utf-8")
    begin, end = (i * len(text) // args.num_texts for i in (piece, piece + 1))
    return capture_layers(model, first_tokens(tokenizer, text[begin:end], length), args.layers)


def features_for(args: argparse.Namespace, length: int) -> list[int]:
    """Those of `--features` for which no method is exact by its length alone."""
    return [features for features in args.features if features < length]


@torch.no_grad()
def error_rows(args: argparse.Namespace, weights: str, length: int, piece: int) -> list[dict[str, Any]]:
    """One row per layer, method and number of features, with the error of every head."""
    rows = []
    layers = layers_of(args, weights, length, piece)
    runs = list(itertools.product(sorted(layers), METHODS, features_for(args, length)))
    exact = {layer: exact_attention(inputs) for layer, inputs in layers.items()}
    norms = {layer: spectral_norm(output) for layer, output in exact.items()}
    for layer, method, features in tqdm(runs, desc=f"{weights} weights, {length} tokens, text {piece}", leave=False):
        # A seed of its own, because the projection of Linformer is the same in all layers of a model.
        output = attend(method, features, layers[layer], layer, seed=SEEDS_PER_TEXT * piece + layer)
        error = spectral_norm(output - exact[layer]) / norms[layer]
        rows.append(
            {
                "of": "error",
                "weights": weights,
                "n": length,
                "text": piece,
                "layer": layer,
                "method": method,
                "features": features,
                "spectral": [float(f"{x:.4g}") for x in error.tolist()],
            }
        )
    return rows


@torch.no_grad()
def time_rows(args: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """One row per method and number of features, with the seconds of one layer; exact attention among them."""
    ((layer, inputs),) = list(layers_of(args, WEIGHTS[0], length, 0).items())[:1]
    functions: dict[tuple[str, int], Callable[[], object]] = {("exact", 0): lambda: exact_attention(inputs)}
    for method, features in itertools.product(METHODS, features_for(args, length)):
        functions[method, features] = functools.partial(attend, method, features, inputs, layer)
    costs = compare_costs(functions, args.repeats, args.device, f"{length} tokens, time")
    return [
        {"of": "time", "n": length, "method": method, "features": features, **cost.row("forward")}
        for (method, features), cost in costs.items()
    ]


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over heads, layers and texts, and the time, by weights, length, method and features."""
    errors: dict[tuple, list[float]] = {}
    for row in rows:
        if row["of"] == "error":
            key = tuple(row[name] for name in ("weights", "n", "method", "features"))
            errors.setdefault(key, []).extend(row["spectral"])
    seconds = {
        (row["n"], row["method"], row["features"]): row["forward_seconds"] for row in rows if row["of"] == "time"
    }
    return [
        {
            "weights": weights,
            "n": n,
            "method": method,
            "features": features,
            "heads": len(values),
            "spectral": float(np.mean(values)),
            "standard_error": float(np.std(values, ddof=1) / len(values) ** 0.5),
            "seconds": seconds.get((n, method, features)),
        }
        for (weights, n, method, features), values in errors.items()
    ]


def print_summary(summary: list[dict[str, Any]]) -> None:
    """A table per weights and length: methods by features."""
    by_place = {tuple(row[x] for x in ("weights", "n", "method", "features")): row["spectral"] for row in summary}
    for weights, n in dict.fromkeys(key[:2] for key in by_place):
        features = sorted({key[3] for key in by_place if key[:2] == (weights, n)})
        rows = [["features", *map(str, features)]]
        for method in METHODS:
            rows.append([method, *(number(by_place.get((weights, n, method, d)), ".3g") for d in features)])
        print(format_table(f"Relative spectral error, {weights} weights, {n} tokens", rows), flush=True)


def plot(record: dict[str, Any], output: Any) -> None:
    """A row per length: error against features with both weights, and error against time."""
    from matplotlib import colormaps

    lengths = record["lengths"]
    figure, axes = new_figure(3, len(lengths))
    colours = dict(zip(METHODS, colormaps["tab20"].colors, strict=False))
    for axis_row, n in zip(axes, lengths, strict=True):
        for weights, axis in zip(("pretrained", "random", None), axis_row, strict=True):
            for method in METHODS:
                rows = [
                    row
                    for row in record["summary"]
                    if (row["weights"], row["n"], row["method"]) == (weights or "pretrained", n, method)
                ]
                x = [row["features"] if weights else 1e3 * row["seconds"] for row in rows]
                errors = [row["spectral"] for row in rows]
                style = {"color": colours[method], "marker": "o", "markersize": 3, "label": method}
                if not weights and method == "vmean":
                    x, errors = x[:1], errors[:1]
                axis.errorbar(x, errors, [row["standard_error"] for row in rows][: len(x)], **style)
            axis.set(xscale="log", yscale="log", ylabel="relative spectral error")
            axis.grid(alpha=0.3)
            if weights:
                axis.set(xlabel="features", title=f"{n} tokens, {weights} weights")
                axis.set_xticks(record["features"], [str(d) for d in record["features"]])
                axis.minorticks_off()
            else:
                (exact,) = (row for row in record["rows"] if row["method"] == "exact" and row["n"] == n)
                axis.axvline(1e3 * exact["forward_seconds"], color="black", linestyle=":", label="exact attention")
                axis.set(xlabel="milliseconds, forward, one layer", title=f"{n} tokens, pretrained weights")
    axes[0, -1].legend(fontsize=7)
    layers = ", ".join(map(str, record["layers"]))
    heads = record["summary"][0]["heads"]
    title = f"Attention of {record['model']}, {heads} heads (layers {layers}; {record['num_texts']} texts)"
    save_figure(figure, title, record, output)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and returns its record."""
    parser = make_parser(__doc__, [1024, 4096])
    parser.add_argument("--features", type=int, nargs="+", default=[2**i for i in range(3, 11)], metavar="N")
    parser.add_argument("--num-texts", type=int, default=3, metavar="N", help="pieces of the text, default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs, default %(default)s")
    args = parser.parse_args(argv)
    args.lengths.sort()
    args.features.sort()

    record = ResumableRecord(args.output, start(args, __file__))
    for length in args.lengths:
        record.part(f"time, {length}", functools.partial(time_rows, args, length))
        for weights, piece in itertools.product(WEIGHTS, range(args.num_texts)):
            make = functools.partial(error_rows, args, weights, length, piece)
            record.part(f"error, {weights}, {length}, {piece}", make)
    result = record.finish(summary=summarise(record.rows))
    print_summary(result["summary"])
    plot(result, args.output)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
