"""Compile every Triton kernel ahead of time, for every configuration and several GPUs; none of them is needed.

The launchers run as they would on a GPU, forward and backward, but each launch compiles its kernel and goes no further.
So what is compiled is what is launched. For each kernel the record holds registers, bytes that spilled, and shared
memory, and whether it fits. It also writes the table of docs/kernels.md. Interrupted, it goes on where it was.

    python scripts/compile_kernels.py --jobs 2             # every kernel in every configuration
    python scripts/compile_kernels.py --target sm_90 --head-dim 64 --dtype bfloat16 --output sm_90.json
    python scripts/compile_kernels.py --table              # only the table, from the record
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock


os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from _document import markdown_table, rewrite
from _record import ResumableRecord, provenance
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from hf_skein_kernels import ops, tiles


ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "kernels_compiled.json"
DOCUMENT = ROOT / "docs" / "kernels.md"
# With TF32 means that PyTorch is allowed it.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float32 with TF32": torch.float32,
}

HEAD_DIMS = (64, 128, 256)  # which take every configuration of `tiles.CONFIGS`

# Bytes per thread that are no problem: ptxas spills so few by choice, mostly far below the limit of registers.
_CHOSEN_SPILL = 16

# By name: what `skein_attention` is called with, so that every branch of every kernel is compiled.
VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "skeinformer": {"method": "skeinformer", "kind": "geometric", "num_pilots": 128},
    "adaptive, two pilots": {"num_pilots": 2},
    "adaptive, dropout": {"dropout": 0.1},
    "adaptive, uniform, mean residual": {"uniform": True, "kind": "mean"},
    "adaptive, no residual": {"kind": "simple"},
    "skeinformer, second order, pilots looked at only": {
        "method": "skeinformer",
        "num_pilots": 128,
        "pilot_reutilization": False,
    },
    "adaptive, plain": {"plain": True},
    "skeinformer, plain": {"method": "skeinformer", "kind": "geometric", "num_pilots": 128, "plain": True},
}


class Target(NamedTuple):
    """A GPU to compile for.

    Attributes:
        gpu: As Triton names it.
        shared: Bytes of shared memory that one program may have.
    """

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166912),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232448),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65536),
}


class _Driver:
    """Stands for the driver of a GPU that is not there."""

    def __init__(self, name: str):
        self.name = name

    def get_current_device(self) -> str:
        return self.name  # under which Triton keeps what it has compiled

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu


@contextmanager
def compiling(target: str, only: Collection[str] = ()) -> Iterator[list]:
    """Within it a launch compiles the kernel for the target and appends what Triton made of it to the list.

    Args:
        target: A name of `TARGETS`.
        only: Kernels, as `file.name`; empty for all.
    """
    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        name = f"{self.__module__.rpartition('.')[2]}.{self.__name__.removesuffix('_kernel')}"
        if not only or name in only:
            compiled.append((name, run(self, *args, grid=grid, warmup=True, **kwargs)))

    def zeros(make):  # nothing is computed, but launchers may use a result as an index
        return lambda *args, **kwargs: make(*args, **kwargs).zero_()

    triton.runtime.driver.set_active(_Driver(target))
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        patches.enter_context(mock.patch.object(ops, "why_not", lambda *_: None))
        patches.enter_context(mock.patch.object(tiles, "ON_ROCM", TARGETS[target].gpu.backend == "hip"))
        for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patches.enter_context(mock.patch.object(where, name, zeros(getattr(where, name))))
        yield compiled


def kernels_sha256() -> str:
    """The SHA-256 of the kernels' sources and configurations, comments and launchers left out."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels" / "hf_skein_kernels").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_kernel = isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list)
            is_table = isinstance(node, ast.AnnAssign | ast.Assign) and ast.unparse(node).startswith("CONFIGS")
            if is_kernel or is_table:
                digest.update(ast.unparse(node).encode())
    return digest.hexdigest()


def launch(dtype: str, head_dim: int, plain: bool = False, **options: Any) -> None:
    """Forward and backward of a small ragged batch with grouped queries, at the default sizes of the selection.

    Plain: without masks and groups, in one chunk; Triton compiles arguments that are 1 as constants.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32" if "TF32" in dtype else "ieee"
    n, heads, kv_heads = (1000, 2, 2) if plain else (2048, 2, 1)
    query, key, value = (
        torch.zeros(1, n, h, head_dim, dtype=DTYPES[dtype]).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    mask = None if plain else torch.ones(1, n, dtype=torch.bool)
    output = ops.skein_attention(query, key, value, mask, mask, **options)
    output.backward(torch.zeros_like(output))


def resources(kernel: Any) -> dict[str, int]:
    """Registers per thread, bytes per thread that spilled, bytes of shared memory per program."""
    if "cubin" in kernel.asm:
        with tempfile.TemporaryDirectory() as folder:
            ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            cubin.write_bytes(kernel.asm["cubin"])
            usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
            registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
            spilled = 0
            if stack:  # what a spill needs, but not a spill for sure
                ptx.write_text(kernel.asm["ptx"])
                gpu = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
                ptxas = getattr(triton.knobs.nvidia, "ptxas" if kernel.metadata.target.arch < 90 else "ptxas_blackwell")
                report = _run(ptxas.path, "-v", "--regAllocOptLevel=2", f"--gpu-name={gpu}", ptx, "-o", cubin)
                spilled = int(re.search(r"(\d+) bytes spill stores", report)[1])
    else:
        text = kernel.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{k}:\s+(\d+)", text)[1]) for k in ("vgpr_count", "vgpr_spill_count"))
        spilled *= 4
    return {"registers": registers, "spilled_bytes": spilled, "shared_bytes": kernel.metadata.shared}


def _run(*command: Any) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def compile_part(
    dtype: str, head_dim: int, target: str, variants: Collection[str], only: Collection[str] = ()
) -> list[dict]:
    """One row per kernel and configuration, with the most that any of its specialisations takes.

    Raises:
        triton.CompilationError: A kernel does not build (or another of Triton's errors).
    """
    rows: dict[tuple, dict] = {}
    seen = set()
    for variant in variants:
        with compiling(target, only) as compiled:
            launch(dtype, head_dim, **VARIANTS[variant])
        for name, kernel in compiled:
            if kernel.hash in seen:
                continue
            seen.add(kernel.hash)
            options = {"warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages}
            row = {"target": target, "dtype": dtype, "head_dim": head_dim, "kernel": name, **options}
            row = rows.setdefault((name, *options.values()), {**row, "specialisations": 0})
            row["specialisations"] += 1
            for resource, used in resources(kernel).items():
                row[resource] = max(used, row.get(resource, 0))
            row["fits"] = row["shared_bytes"] <= TARGETS[target].shared
    return list(rows.values())


def problems(rows: list[dict]) -> list[str]:
    """What must not be: more shared memory than there is; spills of heads of at most 128 numbers."""
    found = []
    for row in rows:
        name = " ".join(str(row[key]) for key in ("target", "kernel", "dtype", "head_dim"))
        if not row["fits"]:
            found.append(f"{name}: {row['shared_bytes']} bytes of shared memory, of {TARGETS[row['target']].shared}")
        if row["spilled_bytes"] > _CHOSEN_SPILL and row["head_dim"] <= 128:
            found.append(f"{name}: {row['spilled_bytes']} bytes per thread spilled")
    return sorted(set(found))


def table(rows: list[dict], dtype: str = "bfloat16") -> str:
    """Markdown: for each kernel and head dimension the most that it takes, by target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    cells: dict[tuple, dict[str, list]] = {}
    for row in rows:
        if row["dtype"] == dtype:
            key = (row["kernel"], row["head_dim"], row["warps"])
            cells.setdefault(key, {}).setdefault(row["target"], []).append(row)

    def most(some: list[dict]) -> str:
        kinds = ("registers", "spilled_bytes", "shared_bytes")
        registers, spilled, shared = (max((row[kind] for row in some), default=0) for kind in kinds)
        return f"{registers} / {spilled} / {shared / 1024:.0f}" if some else ""

    body = [[*key, *(most(by_target.get(t, [])) for t in targets)] for key, by_target in sorted(cells.items())]
    return markdown_table(["kernel", "head dim", "warps", *targets], body)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32", "float32 with TF32"])
    parser.add_argument("--head-dim", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--kernel", nargs="+", default=(), help="only these, as file.name, such as columns.top")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--table", action="store_true", help="write the table of docs/kernels.md from the record")
    options = parser.parse_args(arguments)
    if options.table:
        rewrite(DOCUMENT, "compiled", table(json.loads(options.output.read_text())["rows"]))
        return 0
    header = {
        **provenance("triton"),
        "kernels_sha256": kernels_sha256(),
        "variants": options.variant,
        "kernels": options.kernel,
    }
    record = ResumableRecord(options.output, header)
    parts = {
        f"{dtype} {head_dim} {target}": (dtype, head_dim, target)
        for dtype in options.dtype
        for head_dim in options.head_dim
        for target in options.target
        if "TF32" not in dtype or TARGETS[target].gpu.backend == "cuda"  # elsewhere the kernels never take it
    }
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        coming = {
            name: pool.submit(compile_part, *part, options.variant, options.kernel)
            for name, part in parts.items()
            if name not in record
        }
        for name in parts:
            print(f"{name}: {len(record.part(name, lambda name=name: coming[name].result()))} kernels", flush=True)
    found = problems(record.rows)
    record.finish(problems=found)
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
