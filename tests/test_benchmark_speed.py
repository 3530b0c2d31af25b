"""scripts/benchmark_speed.py: tiny runs whose figures make sense."""

import json
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import _benchmark
import benchmark_speed


def run(text, output, *arguments):
    return benchmark_speed.main(["--text", str(text), "--repeats", "1", "--output", str(output), *map(str, arguments)])


def test_the_record_has_time_memory_and_error_of_every_method(text, tmp_path):
    run(text, tmp_path / "speed", "--lengths", 600, 150, "--front-length", 600)
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["shape"] == {"batch": 1, "heads": 12, "p": 32}
    assert [row["n"] for row in record["rows"]] == [150] * 4 + [600] * 4
    assert set(record["methods"]) == {row["method"] for row in record["rows"]} - {"exact (sdpa)"}
    for row in record["rows"]:
        assert row["forward_backward_seconds"] > 0 and row["forward_seconds"] > 0
        assert row["forward_range"][0] <= row["forward_seconds"] <= row["forward_range"][1]
        assert row["forward_mib"] >= 0 and row["forward_speedup"] > 0
        assert row["error"] == pytest.approx(sum(row["layer_errors"]) / 3)
        if row["method"] == "exact (sdpa)":
            assert row["error"] < 1e-6 and row["forward_speedup"] == 1
        elif row["n"] == 600:
            assert 0.001 < row["error"] < 1
    grown = {row["method"]: row for row in record["growth"]}
    seconds = [row["forward_seconds"] for row in record["rows"] if row["method"] == "exact (sdpa)"]
    assert grown["exact (sdpa)"]["forward_seconds"] == seconds[1] / seconds[0]
    assert str(tmp_path) not in (tmp_path / "speed.json").read_text()
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_in_16_bits_the_sketch_in_float32_is_timed_beside_it(text, tmp_path):
    arguments = ("--settings", "none", "--setting", "mine:num_columns=64", "--lengths", 256, "--dtype", "bfloat16")
    exact, mine = run(text, tmp_path / "bf16", *arguments)["rows"]
    for what in benchmark_speed.PASSES:
        assert mine[f"{what}_float32_seconds"] > 0 and f"{what}_float32_seconds" not in exact


def test_heads_can_be_taken_several_times_over(text, tmp_path, capsys):
    arguments = ("--settings", "none", "--setting", "mine:num_columns=64", "--lengths", 256, 128, "--copies", 1, 3)
    rows = run(text, tmp_path / "copies", *arguments)["rows"]
    assert [(row["n"], row["heads"]) for row in rows] == [(128, 36), (128, 36), (256, 12), (256, 12)]
    for wrong, message in (
        (("--copies", "2"), "one number, at least 1, for each of the 2 lengths"),
        (("--copies", "2", "0"), "one number, at least 1, for each of the 2 lengths"),
        (("--cuda-graphs",), "--cuda-graphs needs --device cuda; it is cpu"),
    ):
        with pytest.raises(SystemExit):
            run(text, tmp_path / "wrong", "--lengths", 256, 128, *wrong)
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("wrong*"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("graphs", [(), ("--cuda-graphs",)])
def test_on_a_gpu_every_backend_is_measured(graphs, text, tmp_path):
    arguments = ("--device", "cuda", "--dtype", "bfloat16", "--head-dim", 64, "--lengths", 600, "--copies", 2)
    rows = run(text, tmp_path / "gpu", *arguments, *graphs)["rows"]
    assert {"exact (sdpa)", "exact (efficient)", "exact (flex)"} <= {row["method"] for row in rows}
    assert all(row["forward_seconds"] > 0 and row["forward_backward_seconds"] > 0 for row in rows)


def test_the_error_falls_with_more_columns_and_smaller_blocks(text, tmp_path, monkeypatch):
    # Of so many settings these take long.
    monkeypatch.setattr(benchmark_speed, "check", lambda *_: None)
    untimed = _benchmark.Cost(1.0, 1.0, 1.0, 0.0)
    monkeypatch.setattr(benchmark_speed, "compare_costs", lambda functions, *_: dict.fromkeys(functions, untimed))
    record = run(text, tmp_path / "front", "--settings", "front", "--lengths", 600)
    error = {row["method"]: row["error"] for row in record["rows"]}
    assert len(error) == 36
    for block in (64, 128, 256, 512, 1024):
        errors = [error[f"adaptive, block {block}, 64 strata, {columns} columns"] for columns in (256, 128, 64)]
        assert errors == sorted(errors)
        assert error[f"adaptive, block {block}, 32 strata, 64 columns"] > errors[-1]
    assert error["adaptive, block 64, 64 strata, 64 columns"] < error["adaptive, block 512, 64 strata, 64 columns"]


def test_wider_heads_have_about_the_same_errors(text, tmp_path):
    arguments = ("--settings", "none", "--setting", "mine:num_columns=64", "--lengths", 256)
    narrow = run(text, tmp_path / "narrow", *arguments)
    wide = run(text, tmp_path / "wide", *arguments, "--head-dim", 48)
    assert wide["shape"]["p"] == 48
    assert [row["method"] for row in wide["rows"]] == ["exact (sdpa)", "mine"]
    assert wide["rows"][1]["error"] == pytest.approx(narrow["rows"][1]["error"], rel=0.1)


def test_beyond_its_limits_exact_is_not_timed_and_some_rows_give_the_error(text, tmp_path, monkeypatch):
    arguments = ("--settings", "none", "--setting", "mine:num_columns=64", "--lengths", 400)
    (_, all_rows), (some_rows,) = (
        run(text, tmp_path / str(limit), *arguments, "--max-exact", limit, "--max-exact-backward", 100)["rows"]
        for limit in (400, 399)
    )
    assert "forward_speedup" in all_rows and "forward_backward_speedup" not in all_rows
    assert "forward_speedup" not in some_rows and some_rows["forward_seconds"] > 0
    assert all_rows["error_rows"] == some_rows["error_rows"] == 400
    assert some_rows["error"] == pytest.approx(all_rows["error"], rel=1e-4)
    monkeypatch.setattr(benchmark_speed, "ERROR_ROWS", 200)
    (sampled,) = run(text, tmp_path / "sampled", *arguments, "--max-exact", 399)["rows"]
    assert sampled["error_rows"] == 200
    assert sampled["error"] == pytest.approx(all_rows["error"], rel=0.2)


def test_an_interrupted_run_continues(text, tmp_path, monkeypatch):
    arguments = ("--settings", "none", "--setting", "mine:num_columns=64", "--lengths", 100, 200)
    measure = benchmark_speed.measure
    measured = []

    def interrupted(args, methods, length, copies):
        measured.append(length)
        if measured == [100, 200]:
            raise KeyboardInterrupt
        return measure(args, methods, length, copies)

    monkeypatch.setattr(benchmark_speed, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path / "x", *arguments)
    rows = json.loads((tmp_path / "x.partial.json").read_text())["parts"]["100"]
    record = run(text, tmp_path / "x", *arguments)
    assert measured == [100, 200, 200]
    assert record["rows"][:2] == rows and [row["n"] for row in record["rows"]] == [100, 100, 200, 200]


def test_nothing_is_timed_when_the_fast_path_is_wrong(text, tmp_path, monkeypatch):
    right = _benchmark.skein_attention
    monkeypatch.setattr(
        _benchmark,
        "skein_attention",
        lambda *args, config, **kwargs: (
            right(*args, config=config, **kwargs) * (1 if config.backend == "reference" else 1.001)
        ),
    )
    monkeypatch.setattr(benchmark_speed, "compare_costs", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="nothing was timed"):
        run(text, tmp_path / "x", "--lengths", 100)
    assert list(tmp_path.iterdir()) == [text]


def test_half_precision_has_the_error_of_its_rounding(text, tmp_path):
    rows = run(text, tmp_path / "x", "--dtype", "bfloat16", "--lengths", 300, "--settings", "none")["rows"]
    assert 1e-4 < rows[0]["error"] < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_has_the_named_backends_beside_it(text, tmp_path):
    record = run(text, tmp_path / "x", "--device", "cuda", "--dtype", "bfloat16", "--lengths", 600)
    methods = {row["method"] for row in record["rows"]}
    assert {"exact (sdpa)", "exact (flash)", "exact (efficient)"} < methods
    assert all(row["forward_mib"] > 0 for row in record["rows"])
