"""Ahead-of-time compilation, and the documents that show it."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import kernel_costs
from _document import replace_marked

from hf_skein.kernels import ops


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "compile_kernels.py"
RECORD = ROOT / "benchmarks" / "results" / "kernels_compiled.json"


def run(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_kernels_compile_without_a_gpu(tmp_path):
    output = tmp_path / "record.json"
    kernels = ["columns.top", "routing.split", "attention.forward"]
    options = ["--target", "sm_90", "gfx942", "--dtype", "float16", "--head-dim", "64", "--variant", "adaptive"]
    done = run(*options, "--kernel", *kernels, "--output", str(output))
    record = json.loads(output.read_text())
    assert done.returncode == 0 and record["problems"] == [], done.stderr + done.stdout
    assert {(row["target"], row["kernel"]) for row in record["rows"]} == {
        (target, kernel) for target in ("sm_90", "gfx942") for kernel in kernels
    }
    assert all(row["registers"] > 0 and row["fits"] for row in record["rows"])


def test_what_is_too_large_is_reported():
    code = (
        "import compile_kernels as c; row = dict(target='gfx942', kernel='a.b', dtype='float32', head_dim=128);"
        "print(c.problems([{**row, 'shared_bytes': 70000, 'fits': False, 'spilled_bytes': 80}]))"
    )
    command = [sys.executable, "-c", code]
    text = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, check=True).stdout
    assert "70000 bytes of shared memory, of 65536" in text and "80 bytes per thread spilled" in text


def test_a_row_has_the_most_of_all_specialisations():
    code = """
import contextlib, types
import compile_kernels as c

def kernel(hash):
    return types.SimpleNamespace(hash=hash, metadata=types.SimpleNamespace(num_warps=4, num_stages=2))

c.compiling = lambda *_: contextlib.nullcontext([("a.b", kernel(x)) for x in ("x", "y", "x")])
c.launch = lambda *_, **__: None
used = {"x": (90, 8, 70000), "y": (100, 4, 60000)}
c.resources = lambda k: dict(zip(("registers", "spilled_bytes", "shared_bytes"), used[k.hash]))
row, = c.compile_part("bfloat16", 64, "gfx942", ["adaptive", "skeinformer"])
print(*(row[x] for x in ("specialisations", "registers", "spilled_bytes", "shared_bytes", "fits")))
"""
    command = [sys.executable, "-c", code]
    text = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, check=True).stdout
    assert text.split() == ["2", "100", "8", "70000", "False"]


def test_record_holds_every_kernel_for_every_target():
    record = json.loads(RECORD.read_text())
    rows = record["rows"]
    assert record["problems"] == []  # what does not fit, and spills of heads of up to 128 numbers
    assert all(row["fits"] for row in rows)
    code = "import compile_kernels; print(compile_kernels.kernels_sha256())"
    digest = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    assert record["kernels_sha256"] == digest.stdout.strip()  # the kernels of the record are those that are here
    sources = (ROOT / "kernels" / "hf_skein_kernels").glob("*.py")
    kernels = {
        f"{path.stem}.{name}" for path in sources for name in re.findall(r"def (\w+)_kernel\(", path.read_text())
    }
    # GPUs of 8.6 and 8.9, compiled for like sm_80, have 99 KiB; what larger heads need, `why_not` knows.
    on_sm_80 = [row for row in rows if row["target"] == "sm_80"]
    assert max(row["shared_bytes"] for row in on_sm_80 if row["head_dim"] <= 128) <= 99 * 1024
    assert max(row["shared_bytes"] for row in on_sm_80) <= ops.LARGE_HEADS_MEMORY
    dtypes = {"bfloat16": {"sm_80", "sm_90", "sm_100", "gfx942"}, "float32": {"sm_80", "sm_90", "sm_100", "gfx942"}}
    for dtype, targets in (dtypes | {"float32 with TF32": {"sm_80", "sm_90", "sm_100"}}).items():
        for target, head_dim in product(targets, (64, 128, 256)):
            chosen = {"target": target, "dtype": dtype, "head_dim": head_dim, "fits": True}
            assert {row["kernel"] for row in rows if chosen.items() <= row.items()} == kernels, chosen


def test_documents_show_the_record_and_the_model(tmp_path):
    document = ROOT / "docs" / "kernels.md"
    text = document.read_text()
    assert replace_marked(text, "costs", kernel_costs.tables()) == text
    code = "import json, sys, compile_kernels as c; print(c.table(json.load(open(sys.argv[1]))['rows']))"
    command = [sys.executable, "-c", code, str(RECORD)]
    table = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, check=True).stdout
    assert replace_marked(text, "compiled", table.strip()) == text
    with pytest.raises(ValueError, match="0 places"):
        replace_marked("", "costs", "")
