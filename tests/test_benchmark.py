"""What the benchmarks share: scripts/_benchmark.py, and the resumable record of scripts/_record.py."""

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import _benchmark
import _record
from _benchmark import PeakMemory, format_table, named_setting
from _record import ResumableRecord, write_json

from hf_skein import SkeinConfig


MIB = 2**20


def test_a_setting_is_read_from_the_command_line():
    name, config = named_setting("mine:block_size=32,residual=mean,num_pilots=None,pilot_reutilization=False")
    assert name == "mine"
    assert config == SkeinConfig(min_length=0, block_size=32, residual="mean", pilot_reutilization=False)
    assert named_setting("plain")[1] == SkeinConfig(min_length=0)


@pytest.mark.parametrize("text", ["x:block_size", "x:no_such_field=1", "x:block_size=0", "x:block_size=wide"])
def test_a_wrong_setting_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        named_setting(text)


CONFIGS = [
    SkeinConfig(min_length=0, num_columns=64),
    SkeinConfig(min_length=0, method="skeinformer", num_columns=64, num_pilots=32),
    SkeinConfig(min_length=0, method="vmean"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_is_green(dtype):
    _benchmark.check(CONFIGS, "cpu", dtype)


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_the_check_stops_a_wrong_fast_path(monkeypatch, wrong):
    right = _benchmark.skein_attention

    def broken(query, key, value, config):
        output = right(query, key, value, config=config)
        if config.backend == "reference":
            return output
        return output * (1 + 1e-6) if wrong == "output" else output + 1e-6 * (query - query.detach())

    monkeypatch.setattr(_benchmark, "skein_attention", broken)
    with pytest.raises(SystemExit, match=wrong):
        _benchmark.check(CONFIGS[:1], "cpu", "float32")


def test_costs_are_those_of_the_functions():
    costs = _benchmark.compare_costs(
        {"short": lambda: time.sleep(0.01), "long": lambda: (bytearray(64 * MIB), time.sleep(0.03))}, 3, "cpu", "test"
    )
    assert 0.01 <= costs["short"].fastest <= costs["short"].seconds <= costs["short"].slowest
    assert costs["short"].seconds < 0.03 <= costs["long"].seconds
    assert costs["short"].mib < 16 and 60 < costs["long"].mib < 90
    assert costs["long"].row("forward").keys() == {"forward_seconds", "forward_range", "forward_mib"}


def test_frobenius_error_is_per_head():
    exact = torch.ones(2, 4, 3)
    output = torch.stack([exact[0], exact[1] * 1.5])
    torch.testing.assert_close(_benchmark.frobenius_error(output, exact), torch.tensor([0.0, 0.5]))


def test_exact_attention_is_the_formula():
    query, key, value = torch.randn(3, 2, 10, 4, dtype=torch.float64)
    expected = (0.3 * query @ key.mT).softmax(-1) @ value
    inputs = _benchmark.LayerInputs(query, key, value, 0.3)
    rows = torch.tensor([7, 2])
    torch.testing.assert_close(_benchmark.exact_attention(inputs), expected)
    torch.testing.assert_close(_benchmark.exact_attention(inputs, rows), expected[:, rows])


def test_a_commit_is_short_and_says_when_it_is_not_all():
    assert _record.short_commit("0123456789abcdef") == "0123456789"
    assert _record.short_commit("0123456789abcdef-dirty") == "0123456789-dirty"
    assert _record.short_commit(None) == "unknown"


def test_a_file_that_git_does_not_know_makes_a_commit_dirty(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path)]
    (tmp_path / "a.py").write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(_record, "__file__", str(tmp_path / "a.py"))
    clean = _record._commit()
    assert len(clean) == 40
    (tmp_path / "notes.txt").write_text("")
    assert _record._commit() == clean
    (tmp_path / "b.py").write_text("")
    assert _record._commit() == f"{clean}-dirty"
    (tmp_path / "b.py").unlink()
    (tmp_path / "a.py").write_text("x = 1")
    assert _record._commit() == f"{clean}-dirty"


def test_an_interrupted_record_is_continued(tmp_path):
    header, made = {"repeats": 2}, []

    def make(name):
        made.append(name)
        if name == "b" and made.count("b") == 1:
            raise KeyboardInterrupt
        return [{"name": name, "figures": (1, 2.5)}]

    def run():
        record = ResumableRecord(tmp_path / "x", header)
        for name in "abc":
            record.part(name, functools.partial(make, name))
        return record.finish(sum=6)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "x.json").exists()
    result = run()
    assert made == ["a", "b", "b", "c"]
    assert result == {**header, "sum": 6, "rows": [{"name": name, "figures": [1, 2.5]} for name in "abc"]}
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_partial_record_of_other_settings_is_not_continued(tmp_path):
    ResumableRecord(tmp_path / "x", {"repeats": 2, "n": 1}).part("a", lambda: [{}])
    with pytest.raises(SystemExit, match=r"another repeats;"):
        ResumableRecord(tmp_path / "x", {"repeats": 3, "n": 1})


def test_other_parts_may_be_asked_for(tmp_path):
    ResumableRecord(tmp_path / "x", {"n": [1, 2]}, ["n"]).part("1", lambda: [{"a": 1}])
    record = ResumableRecord(tmp_path / "x", {"n": [2, 1, 3]}, ["n"])
    for n in (2, 1, 3):
        record.part(str(n), lambda n=n: [{"a": 10 * n}])
    assert record.finish() == {"n": [2, 1, 3], "rows": [{"a": 20}, {"a": 1}, {"a": 30}]}
    ResumableRecord(tmp_path / "y", {"n": [1, 2]}, ["n"]).part("1", lambda: [{"a": 1}])
    record = ResumableRecord(tmp_path / "y", {"n": [2]}, ["n"])
    record.part("2", lambda: [{"a": 2}])
    assert record.finish()["rows"] == [{"a": 2}]
    record = ResumableRecord(tmp_path / "y", {"n": [1]}, ["n"])  # the other part is not lost
    record.part("1", lambda: [{"a": 3}])
    assert record.finish()["rows"] == [{"a": 1}]
    assert (tmp_path / "y.partial.json").exists()


def test_json_has_lists_of_numbers_on_one_line(tmp_path):
    value = {"a": [1, -2.5e-7], "b": [{"c": []}], "d": ["x", "[1,\n 2]"]}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value
    assert '"a": [ 1, -2.5e-07 ],' in text


def test_peak_memory_sees_what_is_freed_within():
    with PeakMemory() as peak:
        block = b"x" * (128 * MIB)
        time.sleep(0.1)  # the sampler is a thread, which gets no turn while a bytes object is made
        del block
    assert 120 < peak.mib < 160


def test_peak_memory_ignores_what_was_held_before():
    block = b"x" * (128 * MIB)
    with PeakMemory() as peak:
        pass
    assert len(block) == 128 * MIB
    assert 0 <= peak.mib < 32


def test_peak_memory_is_known_after_an_error():
    peak = PeakMemory()
    with pytest.raises(RuntimeError), peak:
        block = b"x" * (128 * MIB)
        raise RuntimeError(len(block))
    assert 120 < peak.mib < 160


def test_table_is_aligned():
    table = format_table("Title", [["", "accuracy"], ["full exact", "1.000"]])
    assert table.splitlines() == ["Title", "", "            accuracy", "-" * 20, "full exact     1.000"]
