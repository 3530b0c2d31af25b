"""The command `hf-skein`: what it prints, what it writes, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_convert_checkpoint import tiny
from test_convert_positions import NEW, make_tokenizer
from test_verify import spoil, word_tokenizer, write_words
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from hf_skein.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path):
    tiny("Bert", AutoModelForSequenceClassification).save_pretrained(tmp_path / "a")
    word_tokenizer().save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def words(tmp_path):
    return write_words(tmp_path / "words.txt")


SKETCH = ["--set", "num_columns=8", "--set", "num_strata=2", "--set", "block_size=4", "--set", "min_length=8"]


def test_convert_and_verify(source, words, tmp_path):
    destination = tmp_path / "b"
    result = invoke("convert", source, destination, "--max-length", NEW, *SKETCH)
    assert result.exit_code == 0, result.output
    assert "BertForSequenceClassification, 12 -> 31 tokens (tile)" in result.output
    assert "- The position table was tiled" in result.output and f"hf-skein verify {source}" in result.output
    settings = json.loads((destination / "config.json").read_text())["skein"]
    assert (settings["num_columns"], settings["min_length"]) == (8, 8)

    arguments = ["verify", source, destination, "--text", words, "--repeats", 1, "--min-cosine", -1]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "ok   the class and the names of its weights are the original's" in result.output
    assert (destination / "skein_verify.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((destination / "skein_verify.json").read_text())
    assert record["passed"] and record["rows"][0]["length"] == NEW
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "words.txt"]

    spoil(destination, lambda weights: weights["classifier.weight"].add_(0.1))
    result = invoke(*arguments, "--output", tmp_path / "c")
    assert result.exit_code == 1
    assert "OFF  up to 12 tokens, exact attention" in result.output and "error: something is off" in result.stderr
    assert json.loads((tmp_path / "c" / "skein_verify.json").read_text())["passed"] is False


def test_verify_without_matplotlib(source, words, tmp_path, monkeypatch):
    invoke("convert", source, tmp_path / "b", "--max-length", NEW, *SKETCH)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("verify", source, tmp_path / "b", "--text", words, "--repeats", 1, "--min-cosine", -1)
    assert result.exit_code == 0, result.output
    assert "No plot: Matplotlib is not installed" in result.output
    assert (tmp_path / "b" / "skein_verify.json").exists() and not (tmp_path / "b" / "skein_verify.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-length", "5"], "error: max_length=5 is less than the 12 tokens"),
        (["--positions", "repeat"], "error: positions must be one of"),
        (["--set", "num_columns"], "error: --set expects FIELD=VALUE, got 'num_columns'"),
        (["--set", "method=best"], "error: SkeinConfig.method is 'best'"),
        (["--dtype", "int8"], "error: dtype must be one of"),
        (["--tokenizer", "x", "--no-tokenizer"], "error: --tokenizer and --no-tokenizer exclude each other"),
        (["--tokenizer", "./nothing"], "error: ./nothing is not a folder"),
    ],
)
def test_a_wrong_option_is_an_error_and_writes_nothing(options, message, source, tmp_path):
    result = invoke("convert", source, tmp_path / "b", *options)
    assert result.exit_code == 1 and message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_overwrite_and_options_reach_the_conversion(source, tmp_path):
    (tmp_path / "t").mkdir()
    make_tokenizer().save_pretrained(tmp_path / "t")
    layers = '{"0": {"method": "exact"}}'
    options = [
        "--tokenizer",
        tmp_path / "t",
        "--dtype",
        "bfloat16",
        "--set",
        f"layers={layers}",
        "--positions",
        "interpolate",
    ]
    assert invoke("convert", source, tmp_path / "b", "--max-length", NEW).exit_code == 0
    again = invoke("convert", source, tmp_path / "b", "--max-length", 40, *options)
    assert again.exit_code == 1 and "exists" in again.stderr
    assert invoke("convert", source, tmp_path / "b", "--max-length", 40, *options, "--overwrite").exit_code == 0
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["skein"]["layers"] == {"0": {"method": "exact"}}
    assert invoke("convert", source, tmp_path / "c", "--no-tokenizer").exit_code == 0
    assert not (tmp_path / "c" / "tokenizer.json").exists()


def test_verify_errors(source, tmp_path):
    result = invoke("verify", source, tmp_path / "nothing")
    assert result.exit_code == 1 and "say where to write: --output" in result.stderr
    result = invoke("verify", tmp_path / "nothing", source)
    assert result.exit_code == 1 and "is not a folder" in result.stderr


def test_the_installed_command():
    command = Path(sys.executable).parent / "hf-skein"
    result = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "convert" in result.stdout and "verify" in result.stdout
