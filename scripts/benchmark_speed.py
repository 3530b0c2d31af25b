"""The front: time, memory and error of skein against exact attention, side by side in one run, over the length.

Queries, keys and values are those of a pretrained encoder on a text, its position table tiled to the length. The
middle one of --layers is timed; in 16 bits the sketch in float32 is timed beside it. The error is the relative
Frobenius error of the output, mean over heads and layers; beyond --max-exact tokens it is that of some of the rows. A
check against the float64 reference, outputs and gradients, runs before anything is timed.

    python scripts/benchmark_speed.py --text text.txt --output benchmarks/results/speed_cpu
    python scripts/benchmark_speed.py --text text.txt --output runs/front --settings front --lengths 4096 --head-dim 64
    python scripts/benchmark_speed.py --text text.txt --output benchmarks/results/speed_cuda --device cuda \
        --dtype bfloat16 --head-dim 64 --lengths 4096 16384 65536 --copies 8 4 1 --max-exact 65536 \
        --max-exact-backward 65536 --cuda-graphs

A length that is done is kept; the same command again continues after an interruption.
"""

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from _benchmark import (
    DTYPES,
    LayerInputs,
    add_settings,
    capture_layers,
    check,
    compare_costs,
    describe,
    exact_attention,
    first_tokens,
    format_table,
    frobenius_error,
    load_encoder,
    make_parser,
    new_figure,
    number,
    over_lengths,
    save_figure,
    sketch,
    start,
)
from _record import ResumableRecord
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from hf_skein import SkeinConfig


# From the inputs of a layer and its index to the output `[heads, n, p]`.
Attention = Callable[[LayerInputs, int], Tensor]

EXACT = "exact (sdpa)"
ERROR_ROWS = 512  # queries, where not all are compared
PASSES = ("forward", "forward_backward")
CUDA_BACKENDS = {
    "exact (flash)": SDPBackend.FLASH_ATTENTION,
    "exact (cudnn)": SDPBackend.CUDNN_ATTENTION,
    "exact (efficient)": SDPBackend.EFFICIENT_ATTENTION,
}


def make_methods(args: argparse.Namespace) -> dict[str, SkeinConfig]:
    """The configurations to be measured, by name; one that comes twice is measured once."""
    configs = {
        "default": [
            SkeinConfig(min_length=0),
            SkeinConfig(min_length=0, block_size=64, max_blocks=256, num_columns=256),
            SkeinConfig(min_length=0, method="skeinformer", num_columns=256, num_pilots=128),
        ],
        "front": [
            SkeinConfig(min_length=0, block_size=size, max_blocks=256, num_columns=columns, num_strata=strata)
            for size in (64, 128, 256, 512, 1024)
            for columns, strata in ((64, 1), (128, 1), (32, 32), (64, 32), (64, 64), (128, 64), (256, 64))
        ],
        "none": [],
    }[args.settings]
    return {describe(config): config for config in configs} | dict(args.setting)


def layer_inputs(args: argparse.Namespace, length: int) -> dict[int, LayerInputs]:
    """Inputs of the layers for the first `length` tokens, in the dtype and with the dimensions asked for."""
    model, tokenizer = load_encoder(args.model, length, device=args.device)
    ids = first_tokens(tokenizer, args.text.read_text(encoding="utf-8"), length)
    result = {}
    for layer, inputs in capture_layers(model, ids, args.layers).items():
        if args.head_dim:
            inputs = widen(inputs, args.head_dim)
        result[layer] = LayerInputs(
            *(as_transformers_passes(x).to(DTYPES[args.dtype]) for x in inputs[:3]), inputs.scale
        )
    return result


def as_transformers_passes(x: Tensor) -> Tensor:
    """The same `[heads, n, p]` as a transposed view of `[n, heads, p]`, which is what a model's projections leave."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def widen(inputs: LayerInputs, head_dim: int) -> LayerInputs:
    """The same heads in more dimensions, by one random matrix with orthonormal rows.

    All logits and all norms stay, so the cost is that of larger heads and the error is the same, but for queries that
    routing parts differently: its directions are found iteratively, from a start that depends on the basis.
    """
    p = inputs.query.shape[-1]
    if head_dim < p:
        raise SystemExit(f"error: --head-dim is {head_dim}; the heads of this model have {p} already.")
    columns = torch.linalg.qr(torch.randn(head_dim, p, generator=torch.Generator().manual_seed(0)).double())[0]
    rows = columns.T.to(inputs.query)
    return LayerInputs(*(x @ rows for x in inputs[:3]), inputs.scale)


def exact(backend: SDPBackend | None, inputs: LayerInputs, layer: int) -> Tensor:
    """PyTorch's exact attention by a backend, or as it chooses itself; arguments and result as of `skein`."""
    query, key, value = (x[None] for x in inputs[:3])
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, scale=inputs.scale)[0]


def skein(config: SkeinConfig, inputs: LayerInputs, layer: int) -> Tensor:
    """Skein attention `[heads, n, p]` of a layer, whose index is a key of the random numbers."""
    return sketch(inputs, config, layer)


def copied(inputs: LayerInputs, copies: int) -> LayerInputs:
    """The heads so many times over: as much work as a batch of so many sequences."""
    return LayerInputs(*(as_transformers_passes(x.repeat(copies, 1, 1)) for x in inputs[:3]), inputs.scale)


def flex(inputs: LayerInputs, layer: int) -> Tensor:
    """PyTorch's flex_attention, compiled; arguments and result as of `skein`."""
    query, key, value = (x[None] for x in inputs[:3])
    return _compiled_flex_attention()(query, key, value, scale=inputs.scale)[0]


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def exact_calls(args: argparse.Namespace, inputs: LayerInputs) -> dict[str, Attention]:
    """Exact attention as PyTorch chooses and, on CUDA, by each backend that takes the inputs and by flex_attention."""
    calls: dict[str, Attention] = {EXACT: functools.partial(exact, None)}
    if torch.device(args.device).type == "cpu":
        return calls
    torch.compiler.reset()  # flex_attention is compiled for each length, and for few lengths at a time
    few = LayerInputs(*(x[:, :64] for x in inputs[:3]), inputs.scale)
    others = {name: functools.partial(exact, backend) for name, backend in CUDA_BACKENDS.items()}
    for name, call in (others | {"exact (flex)": flex}).items():
        try:
            call(few, 0)
        except RuntimeError as error:  # what PyTorch raises where a backend does not take a dtype or a device
            print(f"{name} is not available in {args.dtype}: {str(error).splitlines()[0]}")
        else:
            calls[name] = call
    return calls


def measure(args: argparse.Namespace, methods: dict[str, SkeinConfig], length: int, copies: int) -> list[dict]:
    """One row per method: seconds and memory of each pass, how many times faster than the fastest exact one, error."""
    layers = layer_inputs(args, length)
    timed = copied(layers[args.timed_layer], copies)
    exact_ones = exact_calls(args, timed)
    calls = exact_ones | {name: functools.partial(skein, config) for name, config in methods.items()}
    costs = {}
    for what, run, limit in (
        ("forward", forward, args.max_exact),
        ("forward_backward", forward_backward, args.max_exact_backward),
    ):
        functions = {
            name: functools.partial(run, call, timed, args.timed_layer)
            for name, call in calls.items()
            if name not in exact_ones or length <= limit
        }
        if DTYPES[args.dtype].itemsize == 2:  # the sketch in float32 beside it
            wide = LayerInputs(*(x.float() for x in timed[:3]), timed.scale)
            functions |= {
                (name, "float32"): functools.partial(run, calls[name], wide, args.timed_layer) for name in methods
            }
        costs[what] = compare_costs(functions, args.repeats, args.device, f"{length} tokens, {what}", args.cuda_graphs)

    rows = None
    if length > args.max_exact:
        rows = torch.randperm(length, generator=torch.Generator().manual_seed(0))[:ERROR_ROWS].to(args.device)
        calls = {name: call for name, call in calls.items() if name not in exact_ones}
    found = errors(calls, layers, rows)
    table = []
    for name in calls:
        row = {"n": length, "method": name, "error": sum(found[name]) / len(found[name]), "layer_errors": found[name]}
        row["error_rows"] = length if rows is None else len(rows)
        row["heads"] = len(timed.query)
        for what in PASSES:
            if name in costs[what]:
                row |= costs[what][name].row(what)
            if name in costs[what] and EXACT in costs[what]:
                fastest = min(costs[what][other].seconds for other in exact_ones)
                row[f"{what}_speedup"] = fastest / costs[what][name].seconds
            if (name, "float32") in costs[what]:
                row[f"{what}_float32_seconds"] = costs[what][name, "float32"].seconds
        table.append(row)
    return table


@torch.no_grad()
def errors(calls: dict[str, Attention], layers: dict[int, LayerInputs], rows: Tensor | None) -> dict[str, list[float]]:
    """Relative Frobenius error of every layer, mean over heads, of all rows or some."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for layer, inputs in sorted(layers.items()):
        truth = exact_attention(inputs, rows)
        for name, call in calls.items():
            output = call(inputs, layer)
            error = frobenius_error(output if rows is None else output[:, rows], truth)
            found[name].append(error.mean().item())
    return found


@torch.no_grad()
def forward(call: Attention, inputs: LayerInputs, layer: int) -> None:
    """One forward pass."""
    call(inputs, layer)


def forward_backward(call: Attention, inputs: LayerInputs, layer: int) -> None:
    """One forward and backward pass; the gradient of the output is the output."""
    output = call(LayerInputs(*(x.detach().requires_grad_() for x in inputs[:3]), inputs.scale), layer)
    output.backward(output.detach())


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times the seconds and the memory of a head grow where the length grows four times."""
    by_key = {(row["method"], row["n"]): row for row in rows}
    result = []
    for (method, n), row in by_key.items():
        longer = by_key.get((method, 4 * n), {})
        fields = [f"{what}_{unit}" for what in PASSES for unit in ("seconds", "mib")]
        heads = row["heads"] / longer["heads"] if longer else 1
        factors = {f: heads * longer[f] / row[f] for f in fields if row.get(f) and longer.get(f)}
        if factors:
            result.append({"method": method, "from": n, "to": 4 * n, **factors})
    return result


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The rows of one length as a table."""
    header = ["", "error", "forward ms", "", "MiB", "forward+backward ms", "", "MiB"]
    table = [[row["method"], number(row["error"], ".4f")] for row in rows]
    for line, row in zip(table, rows, strict=True):
        for what in PASSES:
            seconds, speedup = row.get(f"{what}_seconds"), row.get(f"{what}_speedup")
            line += [
                number(seconds and 1e3 * seconds, ".1f"),
                number(speedup, ".2f") + ("x" if speedup else ""),
                number(row.get(f"{what}_mib"), ".0f"),
            ]
    print(format_table(f"{rows[0]['n']} tokens", [header, *table]), flush=True)


def print_growth(factors: list[dict[str, Any]]) -> None:
    """The growth factors of `growth` as a table."""
    fields = [f"{what}_{unit}" for what in PASSES for unit in ("seconds", "mib")]
    rows = [["", "from", "to", *(field.replace("_", " ") for field in fields)]]
    for row in factors:
        rows.append([row["method"], str(row["from"]), str(row["to"]), *(number(row.get(f), ".2f") for f in fields)])
    if factors:
        print(format_table("Growth factors", rows))


def plot(record: dict[str, Any], args: argparse.Namespace) -> None:
    """Left: time over the length. Right: error against time at one length, and what nothing else is better than."""
    figure, ((left, right),) = new_figure(2)
    rows = record["rows"]
    lengths = sorted({row["n"] for row in rows})
    at = args.front_length if args.front_length in lengths else lengths[-1]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shape = record["shape"]
    milliseconds = {id(row): 1e3 * row["forward_seconds"] * shape["heads"] / row["heads"] for row in rows}
    if len(methods) > 10:
        left.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        style = {"color": "black"} if method == EXACT else {}
        (line,) = left.plot(
            [row["n"] for row in mine],
            [milliseconds[id(row)] for row in mine],
            marker="o",
            markersize=4,
            label=method,
            **style,
        )
        for row in mine:
            if row["n"] == at and method.startswith("exact"):
                right.axvline(milliseconds[id(row)], color=line.get_color(), linestyle="dotted")
            elif row["n"] == at:
                right.scatter(milliseconds[id(row)], row["error"], color=line.get_color())
                right.annotate(
                    method, (milliseconds[id(row)], row["error"]), (4, 4), textcoords="offset points", fontsize=7
                )
    points = sorted((milliseconds[id(row)], row["error"]) for row in rows if row["n"] == at)
    best = [point for i, point in enumerate(points) if point[1] < min((e for _, e in points[:i]), default=math.inf)]
    right.step(*zip(*best, strict=True), where="post", color="gray", linewidth=0.8, zorder=0)
    over_lengths(left, lengths, yscale="log", ylabel="forward of one layer, ms")
    left.legend(fontsize=7)
    right.set(xlabel="forward of one layer, ms (dotted: exact)", ylabel="relative error of the output, mean of layers")
    right.margins(0.1)
    right.set_ylim(bottom=0)
    right.set_title(f"{at} tokens", fontsize=10)
    right.grid(alpha=0.3)
    widened = " (widened)" if record["head_dim"] else ""
    title = (
        f"One layer of {record['model']} on text, {shape['heads']} heads, p={shape['p']}{widened}, {record['dtype']}"
    )
    save_figure(figure, title, record, args.output)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and returns its record."""
    parser = make_parser(__doc__, [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536])
    add_settings(parser, ["default", "front"], "default")
    parser.add_argument("--head-dim", type=int, metavar="P", help="dimensions per head (default: the model's)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="timings per figure; the median counts")
    parser.add_argument("--max-exact", type=int, default=16384, metavar="N", help="default %(default)s tokens")
    parser.add_argument("--max-exact-backward", type=int, default=8192, metavar="N", help="default %(default)s tokens")
    parser.add_argument("--front-length", type=int, default=4096, metavar="N", help="of the plot of error against time")
    parser.add_argument(
        "--copies", type=int, nargs="+", metavar="N", help="heads so many times over, for each length (default: once)"
    )
    parser.add_argument("--cuda-graphs", action="store_true", help="time CUDA graphs, without the cost of launches")
    args = parser.parse_args(argv)
    args.copies = args.copies or [1] * len(args.lengths)
    if len(args.copies) != len(args.lengths) or min(args.copies) < 1:
        parser.error(f"--copies needs one number, at least 1, for each of the {len(args.lengths)} lengths.")
    if args.cuda_graphs and torch.device(args.device).type != "cuda":
        parser.error(f"--cuda-graphs needs --device cuda; it is {args.device}.")
    args.lengths, args.copies = map(list, zip(*sorted(zip(args.lengths, args.copies, strict=True)), strict=True))
    args.timed_layer = sorted(args.layers)[len(args.layers) // 2]

    methods = make_methods(args)
    header = start(args, __file__)
    check(methods.values(), args.device, args.dtype)
    # The shape is that of the heads as measured; a few tokens tell it.
    heads, _, p = layer_inputs(args, 16)[args.timed_layer].query.shape
    header |= {"shape": {"batch": 1, "heads": heads, "p": p}}
    header |= {"methods": {name: config.to_dict() for name, config in methods.items()}}
    record = ResumableRecord(args.output, header, ("lengths", "copies", "front_length"))
    for length, copies in zip(args.lengths, args.copies, strict=True):
        name = f"{length} x {copies}" if copies > 1 else str(length)
        print_rows(record.part(name, functools.partial(measure, args, methods, length, copies)))
    factors = growth(record.rows)
    print_growth(factors)
    result = record.finish(growth=factors)
    plot(result, args)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
