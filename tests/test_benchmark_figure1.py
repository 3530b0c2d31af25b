import json
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark_figure1
from _benchmark import capture_layers, first_tokens, load_encoder

import hf_skein
from hf_skein.baselines import baseline_attention


N = 100
SETTINGS = ("--lengths", N, "--features", 12, 48, 512, "--layers", 1, "--num-texts", 2, "--repeats", 1)


def run(text, output, *arguments):
    return benchmark_figure1.main(["--text", str(text), "--output", str(output), *map(str, arguments)])


@torch.no_grad()
def test_the_figures_are_those_of_a_direct_computation(text, tmp_path):
    record = run(text, tmp_path / "x", *SETTINGS)
    model, tokenizer = load_encoder(None, N)
    pieces = text.read_text()[: (size := text.stat().st_size) // 2], text.read_text()[size // 2 :]
    own = {
        "skeinformer": {"method": "skeinformer", "num_columns": 48},
        "adaptive": {"num_columns": 32, "num_strata": 16},
        "adaptive, blocks of 64": {"num_columns": 32, "num_strata": 16, "max_blocks": 256},
    }
    means: dict[str, list[float]] = {method: [] for method in benchmark_figure1.METHODS}
    for i, piece in enumerate(pieces):
        inputs = capture_layers(model, first_tokens(tokenizer, piece, N), [1])[1]
        query, key, value = (x[None] for x in inputs[:3])
        exact = ((query @ key.mT * inputs.scale).softmax(-1) @ value)[0]
        for method in benchmark_figure1.METHODS:
            if method in own:
                config = hf_skein.SkeinConfig(min_length=0, seed=1000 * i + 1, **own[method])
                output = hf_skein.skein_attention(query, key, value, config=config, layer=1)
            else:
                config = hf_skein.SkeinConfig(min_length=0, num_columns=48, seed=1000 * i + 1)
                output = baseline_attention(query, key, value, config=config, method=method, layer=1)
            errors = torch.linalg.matrix_norm(output[0] - exact, 2) / torch.linalg.matrix_norm(exact, 2)
            (row,) = (
                row
                for row in record["rows"]
                if row["of"] == "error"
                and (row["weights"], row["text"], row["method"], row["features"]) == ("pretrained", i, method, 48)
            )
            assert row["spectral"] == pytest.approx(errors.tolist(), rel=2e-3, abs=1e-5)
            means[method] += errors.tolist()
    for row in record["summary"]:
        if (row["weights"], row["features"]) == ("pretrained", 48):
            values = torch.tensor(means[row["method"]])
            assert row["heads"] == 24 == len(values)
            assert row["spectral"] == pytest.approx(values.mean().item(), rel=2e-3)
            assert row["standard_error"] == pytest.approx(values.std().item() / 24**0.5, rel=1e-2)
    assert {row["features"] for row in record["summary"]} == {12, 48}  # with 512 everything would be exact
    timed = {(row["method"], row["features"]) for row in record["rows"] if row["of"] == "time"}
    assert timed == {("exact", 0)} | {(method, d) for method in benchmark_figure1.METHODS for d in (12, 48)}
    assert all(row["seconds"] > 0 for row in record["summary"])
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert str(tmp_path) not in (tmp_path / "x.json").read_text()


def test_an_interrupted_run_continues(text, tmp_path, monkeypatch):
    compute, calls = benchmark_figure1.error_rows, []
    monkeypatch.setattr(benchmark_figure1, "METHODS", ("vmean", "adaptive"))

    def interrupted(args, weights, length, piece):
        calls.append((weights, piece))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(args, weights, length, piece)

    monkeypatch.setattr(benchmark_figure1, "error_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path / "x", *SETTINGS)
    record = run(text, tmp_path / "x", *SETTINGS)
    assert calls == [("pretrained", 0), ("pretrained", 1), ("random", 0), ("random", 0), ("random", 1)]
    assert json.loads((tmp_path / "x.json").read_text()) == record
