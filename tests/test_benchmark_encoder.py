"""scripts/benchmark_encoder.py on an encoder of two small layers."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark_encoder
from benchmark_encoder import crossover


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    monkeypatch.setitem(benchmark_encoder.SIZES, "tiny", sizes)


def run(output, *arguments):
    settings = ["--sizes", "tiny", "--lengths", "640", "128", "--repeats", "1"]
    return benchmark_encoder.main([*settings, "--output", str(output), *map(str, arguments)])


def test_the_record_has_both_passes_and_the_peers(tmp_path):
    peers = list(benchmark_encoder.PEERS)
    run(tmp_path / "x", "--peers", *peers)
    record = json.loads((tmp_path / "x.json").read_text())
    keys = [(row["n"], row["pass"], row["method"]) for row in record["rows"]]
    expected = []
    for n in (128, 640):
        expected += [(n, "inference", method) for method in ("sdpa", "skein", *peers)]
        expected += [(n, "training", method) for method in ("sdpa", "skein")]
    assert keys == expected
    by_key = dict(zip(keys, record["rows"], strict=True))
    for (n, what, method), row in by_key.items():
        assert row["range"][0] <= row["seconds"] <= row["range"][1] and row["mib"] >= 0
        assert row["tokens_per_second"] == pytest.approx(n / row["seconds"])
        if method == "sdpa":
            assert "speedup" not in row
        else:
            assert row["speedup"] == pytest.approx(by_key[n, what, "sdpa"]["seconds"] / row["seconds"])
        assert ("attention_share" in row) == (what == "inference" and method in ("sdpa", "skein"))
        assert 0 < row.get("attention_share", 0.5) < 1
    assert [(row["size"], row["pass"]) for row in record["crossover"]] == [("tiny", "inference"), ("tiny", "training")]
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_exact_attention_has_its_limits(tmp_path):
    record = run(tmp_path / "x", "--max-exact", 639, "--max-exact-training", 100, "--max-training", 300)
    keys = [(row["n"], row["pass"], row["method"]) for row in record["rows"]]
    inference = [(128, "inference", "sdpa"), (128, "inference", "skein"), (640, "inference", "skein")]
    assert sorted(keys) == sorted([*inference, (128, "training", "skein")])
    assert record["crossover"] == []


def test_both_attentions_have_the_same_weights_and_differ_where_skein_sketches():
    args = argparse.Namespace(device="cpu", dtype="float32", max_exact=1000)
    models = benchmark_encoder.make_models(args, "tiny", 640)
    ids = benchmark_encoder.make_ids(args, 640)
    for one, other in zip(models["sdpa"].parameters(), models["skein"].parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()
    with torch.no_grad():
        # Random weights attend to everything alike, which a sketch does exactly.
        for layer in models["sdpa"].encoder.layer:
            layer.attention.self.query.weight *= 30
            layer.attention.self.key.weight *= 30
        exact, skein = (models[name](ids).last_hidden_state for name in ("sdpa", "skein"))
        torch.testing.assert_close(models["skein"](ids[:, :128])[0], models["sdpa"](ids[:, :128])[0])
    assert 1e-3 < (exact - skein).norm() / exact.norm() < 0.5
    benchmark_encoder.train(models["skein"].train(), ids)
    assert all(parameter.grad is None for parameter in models["skein"].parameters())


@pytest.mark.parametrize("name", ["sdpa", "skein"])
def test_the_share_of_attention_is_that_of_the_time_in_it(monkeypatch, name):
    args = argparse.Namespace(device="cpu", dtype="float32", max_exact=1000)
    model = benchmark_encoder.make_models(args, "tiny", 640)[name]
    ticks = iter(range(100))
    monkeypatch.setattr(benchmark_encoder.time, "perf_counter", lambda: next(ticks))
    # One tick before, two for each of both layers, one after: two of five steps between ticks are in attention.
    assert benchmark_encoder.attention_share(model, benchmark_encoder.make_ids(args, 640), name) == 2 / 5
    assert model.config._attn_implementation == name


def test_the_crossover_is_interpolated_in_logarithms():
    assert crossover([1000, 4000], [0.5, 2.0]) == {"tokens": 2000, "is": "interpolated"}
    assert crossover([1000, 2000, 4000], [1.2, 0.5, 2.0]) == {"tokens": 2828, "is": "interpolated"}
    assert crossover([1000, 2000], [1.1, 2.0]) == {"tokens": 1000, "is": "at most"}
    assert crossover([1000, 2000], [1.1, 0.9]) == {"tokens": 2000, "is": "more than"}


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    compare, titles = benchmark_encoder.compare_costs, []

    def interrupted(functions, repeats, device, title):
        titles.append(title)
        if len(titles) == 3:
            raise KeyboardInterrupt
        return compare(functions, repeats, device, title)

    monkeypatch.setattr(benchmark_encoder, "compare_costs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "x")
    parts = json.loads((tmp_path / "x.partial.json").read_text())["parts"]
    record = run(tmp_path / "x")
    n128 = [f"tiny, 128 tokens, {what}" for what in ("inference", "training")]
    n640 = [f"tiny, 640 tokens, {what}" for what in ("inference", "training")]
    assert titles == [*n128, n640[0], *n640]
    assert record["rows"][:4] == [row for rows in parts.values() for row in rows]
    assert len(record["rows"]) == 8
