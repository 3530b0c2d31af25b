"""How long every stage of the Triton kernels takes on a GPU, beside the floor that scripts/kernel_costs.py gives.

    python scripts/measure_kernels.py --output benchmarks/results/kernel_times

Forward passes in bf16 on random inputs, without masks, at the default settings. The GPU is kept busy until all of a
pass has been launched, so launches cost no time here. An event before and after each launch takes some itself, hence a
whole pass is measured without them, too. Medians of several passes; a part that is done is kept, and the same command
continues after an interruption.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _document import markdown_table
from _record import ResumableRecord, provenance
from kernel_costs import GPUS, HEADS, METHODS

from hf_skein import SkeinConfig, skein_attention
from hf_skein.kernels import attention


WHOLE = "**whole pass, measured at once**"

# As PyTorch names the GPUs of the model.
DEVICES = {"NVIDIA H200": "H200", "NVIDIA A100-SXM4-80GB": "A100"}

# By kernel, as `file.name`; "" stands for the stage before it.
STAGES = {
    "layout.layout": "layout",
    "layout.mark": "columns",
    "covariance.covariance": "routing: coordinates",  # but of pilots
    "exact_rows.combine": "exact rows, and means of keys and values",  # but after the attention
    "moments.add": "",
    "exact_rows.forward": "exact rows, and means of keys and values",
    "pilots.pilot_rows": "exact rows, and means of keys and values",
    "routing.components": "routing: coordinates",
    "routing.points": "routing: coordinates",
    "routing.split": "routing: tree",
    "pilots.mean": "pilots",
    "strata.means": "strata: means",
    "columns.score": "scores, and strata of keys",
    "columns.draw": "scores by the pilots",
    "columns.top": "columns",
    "moments.totals": "sums over strata, and products",
    "residual.block": "residual of the blocks",
    "attention.forward": "attention",
}


def stages(kernels: list[str]) -> list[str]:
    """The stage of every launch, in order."""
    found: list[str] = []
    for i, kernel in enumerate(kernels):
        stage = STAGES[kernel] or found[-1]
        if kernel == "covariance.covariance" and kernels[i - 1] == "pilots.mean":
            stage = "pilots"
        elif kernel == "exact_rows.combine" and "attention.forward" in kernels[:i]:
            stage = "attention"
        found.append(stage)
    return found


@contextmanager
def recorded(mark: Callable[[], Any]) -> Iterator[list[tuple[str, Any, Any]]]:
    """Within it every launch is appended to the list: the kernel, and what `mark` gave before and after it."""
    launches = []
    kind = type(attention.forward_kernel)
    run = kind.run

    def recording(self, *args, **kwargs):
        before = mark()
        result = run(self, *args, **kwargs)
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__.removesuffix('_kernel')}"
        launches.append((name, before, mark()))
        return result

    with mock.patch.object(kind, "run", recording):
        yield launches


def event() -> torch.cuda.Event:
    """An event that was recorded now."""
    result = torch.cuda.Event(enable_timing=True)
    result.record()
    return result


@contextmanager
def busy() -> Iterator[None]:
    """Keeps the GPU busy until all has been launched, and waits for it then."""
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # clock cycles
    yield
    torch.cuda.synchronize()


@torch.no_grad()
def measure(method: str, p: int, n: int, repeats: int) -> list[dict[str, Any]]:
    """A row per stage: median seconds, and its floor on this GPU if that is one of the model's."""
    config = SkeinConfig(method=method, min_length=0, backend="triton")
    tensors = (torch.randn(1, n, HEADS[n], p, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    run = functools.partial(skein_attention, *tensors, config=config)
    run()
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        with busy():
            begin = event()
            run()
            end = event()
        whole = begin.elapsed_time(end) / 1e3
        with busy(), recorded(event) as launches:
            run()
        of_stages: dict[str, float] = {WHOLE: whole}
        for stage, (_, before, after) in zip(stages([name for name, *_ in launches]), launches, strict=True):
            of_stages[stage] = of_stages.get(stage, 0.0) + before.elapsed_time(after) / 1e3
        for stage, value in of_stages.items():
            seconds.setdefault(stage, []).append(value)
    gpu = GPUS.get(DEVICES.get(torch.cuda.get_device_name(), ""))
    model = {stage.name: stage for stage in METHODS[method](n, p, SkeinConfig())}
    rows = []
    for stage, values in seconds.items():
        row = {
            "method": method,
            "p": p,
            "n": n,
            "heads": HEADS[n],
            "stage": stage,
            "seconds": statistics.median(values),
        }
        if stage in model:
            row |= {"part": model[stage].part, "floor_seconds": gpu and model[stage].seconds(gpu, HEADS[n])}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: microseconds, floors and shares of the stages of one part."""
    total = sum(row["seconds"] for row in rows if row["stage"] != WHOLE)
    body = [
        [
            row["stage"],
            f"{1e6 * row['seconds']:.0f}",
            f"{1e6 * row['floor_seconds']:.0f}" if row.get("floor_seconds") else "",
            "" if row["stage"] == WHOLE else f"{row['seconds'] / total:.0%}",
        ]
        for row in rows
    ]
    for name, parts in (("share of choosing", ("choice",)), ("with the residual", ("choice", "residual"))):
        share = sum(row["seconds"] for row in rows if row.get("part") in parts) / total
        body.append([name, "", "", f"{share:.0%}"])
    first = rows[0]
    head = f"`{first['method']}`, p={first['p']}, n={first['n']}, {first['heads']} heads"
    return markdown_table([head, "µs", "floor", "share"], [*body, ["sum of the stages", f"{1e6 * total:.0f}", "", ""]])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the .json written")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--lengths", nargs="+", type=int, choices=HEADS, default=list(HEADS))
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA or ROCm GPU; scripts/kernel_costs.py gives the floors without one.")
    record = ResumableRecord(options.output, {"repeats": options.repeats, **provenance("triton", "hf-skein")})
    for method in options.method:
        for p in options.head_dim:
            for n in options.lengths:
                make = functools.partial(measure, method, p, n, options.repeats)
                print(table(record.part(f"{method} {p} {n}", make)), end="\n\n", flush=True)
    return record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
