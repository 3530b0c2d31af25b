"""End to end: a whole encoder with skein and with exact attention, side by side, over the length.

Inference and one training step (forward and backward, no dropout) on one document, by encoders of BERT's architecture
and random weights, in the sizes of BERT-base and of MiniLM. Seconds, peak memory, tokens per second, the share of
attention in the time of inference, and the crossover: the length from which skein is faster. For that it sketches at
every length (`min_length=0`), else in its default settings. Other long-document encoders of Transformers, in the same
sizes, can be measured beside them.

    python scripts/benchmark_encoder.py --output runs/encoder --peers longformer big_bird nystromformer

What is done is kept; the same command again continues after an interruption.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from _benchmark import (
    DTYPES,
    Cost,
    compare_costs,
    format_table,
    make_parser,
    new_figure,
    number,
    over_lengths,
    save_figure,
    start,
    synchronize,
    use_attention,
)
from _record import ResumableRecord
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    LongformerConfig,
    LongformerModel,
    NystromformerConfig,
    NystromformerModel,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_skein import SkeinConfig


ATTENTIONS = ("sdpa", "skein")
SKEIN = SkeinConfig(min_length=0)
PASSES = ("inference", "training")
SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
COMMON = {"vocab_size": 30522, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make_bert(size: str, length: int) -> PreTrainedModel:
    """An encoder of BERT's architecture with random weights and `length` positions."""
    return BertModel(BertConfig(**SIZES[size], **COMMON, max_position_embeddings=length), add_pooling_layer=False)


def make_longformer(size: str, length: int) -> PreTrainedModel:
    # Two positions are reserved; a window of 512 is that of the published checkpoints.
    config = LongformerConfig(**SIZES[size], **COMMON, max_position_embeddings=length + 2, attention_window=512)
    return LongformerModel(config, add_pooling_layer=False)


def make_big_bird(size: str, length: int) -> PreTrainedModel:
    config = BigBirdConfig(
        **SIZES[size], **COMMON, max_position_embeddings=length, attention_type="block_sparse", block_size=64
    )
    return BigBirdModel(config, add_pooling_layer=False)


def make_nystromformer(size: str, length: int) -> PreTrainedModel:
    config = NystromformerConfig(
        **SIZES[size], **COMMON, max_position_embeddings=length, segment_means_seq_len=length, num_landmarks=64
    )
    return NystromformerModel(config)


PEERS = {"longformer": make_longformer, "big_bird": make_big_bird, "nystromformer": make_nystromformer}


def make_models(args: argparse.Namespace, size: str, length: int) -> dict[str, nn.Module]:
    """The encoder with either attention, sharing its weights, in eval mode."""
    torch.manual_seed(0)
    model = make_bert(size, length).to(args.device, DTYPES[args.dtype])
    models = {"sdpa": model, "skein": make_bert(size, length)}
    models["skein"].load_state_dict(model.state_dict(), assign=True)
    models["skein"].to(args.device)  # buffers
    for name, one in models.items():
        use_attention(one, SKEIN if name == "skein" else None)
        one.eval()
    return {name: models[name] for name in ATTENTIONS if name == "skein" or length <= args.max_exact}


def make_ids(args: argparse.Namespace, length: int) -> Tensor:
    """`[1, length]` random tokens, none of them special."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, 30000, (1, length), generator=generator).to(args.device)


@torch.no_grad()
def infer(model: nn.Module, ids: Tensor) -> None:
    """A forward pass."""
    model(ids)


def train(model: nn.Module, ids: Tensor) -> None:
    """A forward and a backward pass; the gradients are dropped."""
    model(ids).last_hidden_state.square().mean().backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def attention_share(model: PreTrainedModel, ids: Tensor, name: str) -> float:
    """The share of the time of a forward pass that is spent in the attention function `name`."""
    inside = 0.0
    device = str(model.device)
    attention = ALL_ATTENTION_FUNCTIONS[name]

    def timed(*args, **kwargs):
        nonlocal inside
        synchronize(device)
        begin = time.perf_counter()
        result = attention(*args, **kwargs)
        synchronize(device)
        inside += time.perf_counter() - begin
        return result

    AttentionInterface.register("timed", timed)
    AttentionMaskInterface.register("timed", ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation("timed")
    begin = time.perf_counter()
    model(ids)
    synchronize(device)
    total = time.perf_counter() - begin
    model.set_attn_implementation(name)
    return inside / total


def make_rows(size: str, length: int, what: str, costs: dict[str, Cost]) -> list[dict[str, Any]]:
    """A record's rows, one per method."""
    rows = []
    for name, cost in costs.items():
        row = {"size": size, "n": length, "method": name, "pass": what, "seconds": cost.seconds}
        row |= {"range": [cost.fastest, cost.slowest], "mib": round(cost.mib, 1)}
        row |= {"tokens_per_second": length / cost.seconds}
        if name != "sdpa" and "sdpa" in costs:
            row["speedup"] = costs["sdpa"].seconds / cost.seconds
        rows.append(row)
    return rows


def measure_inference(args: argparse.Namespace, size: str, length: int) -> list[dict[str, Any]]:
    """One row per method, peers included."""
    models, ids = make_models(args, size, length), make_ids(args, length)
    peers = {name: PEERS[name](size, length).to(args.device, DTYPES[args.dtype]).eval() for name in args.peers}
    functions = {name: functools.partial(infer, model, ids) for name, model in (models | peers).items()}
    costs = compare_costs(functions, args.repeats, args.device, f"{size}, {length} tokens, inference")
    rows = make_rows(size, length, "inference", costs)
    for row in rows:
        if row["method"] in models:
            row["attention_share"] = attention_share(models[row["method"]], ids, row["method"])
    return rows


def measure_training(args: argparse.Namespace, size: str, length: int) -> list[dict[str, Any]]:
    """One row for either attention."""
    models, ids = make_models(args, size, length), make_ids(args, length)
    functions: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        if name == "skein" or length <= args.max_exact_training:
            functions[name] = functools.partial(train, model.train(), ids)
    costs = compare_costs(functions, args.repeats, args.device, f"{size}, {length} tokens, training")
    return make_rows(size, length, "training", costs)


def crossover(lengths: list[int], speedups: list[float]) -> dict[str, Any]:
    """The length from which skein is faster at all lengths measured, interpolated between two of them in logarithms.

    Args:
        lengths: In ascending order; such as are sketched.
        speedups: Seconds of exact over those of skein, at each.

    Returns:
        `tokens`, and `is`: `"interpolated"`; or `"at most"` the first or `"more than"` the last length.
    """
    first = len(lengths)
    while first > 0 and speedups[first - 1] > 1:
        first -= 1
    if first == len(lengths):
        return {"tokens": lengths[-1], "is": "more than"}
    if first == 0:
        return {"tokens": lengths[0], "is": "at most"}
    (x, y), (below, above) = (map(math.log, pair[first - 1 : first + 1]) for pair in (lengths, speedups))
    return {"tokens": round(math.exp(x + (y - x) * -below / (above - below))), "is": "interpolated"}


def crossovers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One per size and pass, over the lengths at which skein sketches and exact attention was measured."""
    result = []
    for size, what in dict.fromkeys((row["size"], row["pass"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["pass"], row["method"]) == (size, what, "skein")]
        mine = [row for row in mine if row["n"] > SKEIN.exact_length and "speedup" in row]
        if mine:
            found = crossover([row["n"] for row in mine], [row["speedup"] for row in mine])
            result.append({"size": size, "pass": what, **found})
    return result


def print_size(rows: list[dict[str, Any]], size: str) -> None:
    """All that was measured of one size."""
    header = ["", "tokens", "inference s", "", "tokens/s", "MiB", "attention", "training step s", "", "tokens/s", "MiB"]
    by_key: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["size"] == size:
            by_key.setdefault((row["n"], row["method"]), {})[row["pass"]] = row
    table = [header]
    for (n, method), passes in by_key.items():
        line = [method, str(n)]
        for what in PASSES:
            row = passes.get(what, {})
            speedup = number(row.get("speedup"), ".2f") + ("x" if "speedup" in row else "")
            line += [number(row.get("seconds"), ".3f"), speedup]
            line += [number(row.get("tokens_per_second"), ".0f"), number(row.get("mib"), ".0f")]
            if what == "inference":
                line.append(number(row.get("attention_share"), ".0%"))
        table.append(line)
    print(format_table(f"Encoder of the size {size}, one document", table), flush=True)


def plot(record: dict[str, Any], args: argparse.Namespace) -> None:
    """A row per size: seconds of inference and of a training step, and the share of attention."""
    panels = (
        ("inference", "seconds", "inference, s"),
        ("training", "seconds", "training step, s"),
        ("inference", "attention_share", "share of attention in inference"),
    )
    figure, axes = new_figure(len(panels), len(args.sizes))
    for line, size in zip(axes, args.sizes, strict=True):
        for axis, (what, key, label) in zip(line, panels, strict=True):
            mine = [row for row in record["rows"] if row["size"] == size and row["pass"] == what and key in row]
            for method in dict.fromkeys(row["method"] for row in mine):
                points = [(row["n"], row[key]) for row in mine if row["method"] == method]
                style = {"color": "black"} if method == "sdpa" else {}
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method, **style)
            is_share = key == "attention_share"
            over_lengths(axis, args.lengths, ylabel=label, yscale="linear" if is_share else "log", title=size)
            if is_share:
                axis.set_ylim(0, 1)
            axis.legend(fontsize=8)
    save_figure(figure, f"Encoders with random weights, one document, {record['dtype']}", record, args.output)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and returns its record."""
    parser = make_parser(__doc__, [512, 1024, 2048, 4096, 8192, 16384], model=False, text=False)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[], help="inference of these too")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="timings per figure; the median counts")
    parser.add_argument("--max-exact", type=int, default=16384, metavar="N", help="default %(default)s tokens")
    parser.add_argument("--max-exact-training", type=int, default=8192, metavar="N", help="default %(default)s tokens")
    parser.add_argument("--max-training", type=int, default=16384, metavar="N", help="default %(default)s tokens")
    args = parser.parse_args(argv)
    args.lengths.sort()
    transformers.logging.set_verbosity_error()

    header = start(args, __file__) | {"skein": SKEIN.to_dict(), "architectures": SIZES}
    record = ResumableRecord(args.output, header, ("lengths", "sizes", "max_training"))
    for size in args.sizes:
        for length in args.lengths:
            record.part(f"{size}, {length}, inference", functools.partial(measure_inference, args, size, length))
            if length <= args.max_training:
                record.part(f"{size}, {length}, training", functools.partial(measure_training, args, size, length))
        print_size(record.rows, size)
    found = crossovers(record.rows)
    result = record.finish(crossover=found)
    table = [["", "", "tokens"]]
    for row in found:
        is_bound = row["is"] != "interpolated"
        table.append([row["size"], row["pass"], f"{row['is']} {row['tokens']}" if is_bound else str(row["tokens"])])
    print(format_table("Skein is faster from this length on", table))
    plot(result, args)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
