"""The folder `kernels/` as a kernel of the Hub: pure Python, loaded from a folder and beside the installed package."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import hf_skein.kernels


SOURCE = Path(__file__).parents[1] / "kernels"

hub = pytest.importorskip("kernels", reason="Transformers 5.3 cannot import the versions of `kernels` that are tested")


def general() -> dict:
    """`[general]` of build.toml; a parser of TOML comes with Python 3.11 only."""
    lines = (SOURCE / "build.toml").read_text().partition("[general]\n")[2].partition("\n\n")[0].splitlines()
    return {key: ast.literal_eval(value) for key, value in (line.split(" = ") for line in lines)}


def test_build_configuration():
    from kernels._rust import Build

    assert len(Build.open(SOURCE).general.backends) == 2
    assert general()["backends"] == ["cuda", "rocm"]
    package = SOURCE / "torch-ext" / general()["name"].replace("-", "_")  # where kernel-builder looks for it
    assert package.samefile(SOURCE / "hf_skein_kernels")


def test_imports_are_torch_triton_and_relative():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in (SOURCE / "hf_skein_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {name.name.partition(".")[0] for name in node.names} <= allowed, path
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.partition(".")[0] in allowed, path


def test_loads_as_a_hub_kernel(tmp_path):
    variant = tmp_path / "build" / "torch-cuda"  # as kernel-builder lays it out
    shutil.copytree(SOURCE / "hf_skein_kernels", variant, ignore=shutil.ignore_patterns("__pycache__"))
    settings = general()
    metadata = {
        "name": settings["name"],
        "id": f"_{settings['name'].replace('-', '_')}_cuda_0123abc",
        "version": settings["version"],
        "license": settings["license"],
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    loaded = hub.get_local_kernel(variant)
    assert loaded.skein_attention is not hf_skein.kernels.skein_attention
    assert hasattr(torch.ops, metadata["id"])  # operators of its own, so that both can be loaded

    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key, value = (torch.randn(1, 1, 40, 16, device=device) for _ in range(3))
    options = {"num_columns": 8, "num_strata": 2, "block_size": 32, "exact_length": 8}
    ours = hf_skein.kernels.skein_attention(query, key, value, **options)
    torch.testing.assert_close(loaded.skein_attention(query, key, value, **options), ours, rtol=0, atol=0)
