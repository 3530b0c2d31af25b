"""`lra.py report`: what is merged, what is refused, and the tables."""

import copy
import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import lra
from _data import InputError
from _lra_data import TASKS
from _lra_model import METHODS
from _lra_report import BEGIN, END, PAPER, accuracies, guess, merge, minutes


ROOT = Path(__file__).parents[1]


def write_run(folder: Path, task: str, method: str, seed: int, accuracy: float, **changes) -> Path:
    """A record as `lra.py train` writes it."""
    settings = {"task": task, "method": method, "seed": seed, "batch_size": 4, "steps": 3, "learning_rate": 1e-3}
    shares = [0.5, 0.5] if TASKS[task].labels == 2 else [0.3, 0.2, *[0.0625] * 8]
    part = {"examples": 10, "label_shares": shares, "mean_length": 100.0}
    record = {
        "settings": settings | {"device": "cpu"} | changes,
        "skein": None,
        "data": {"task": task, "parts": {"train": part, "validation": part, "test": part}},
        "versions": {"torch": "2"},
        "hardware": {"cpu": "x", "threads": 1, "gpu": None},
        "commit": "c",
        "parameters": 5,
        "losses": [0.7, 0.6, 0.5],
        "evaluations": [{"step": 3, "loss": 0.6, "accuracy": accuracy}],
        "best_step": 3,
        "test": {"accuracy": accuracy, "loss": 0.6},
        "training_seconds": 1.8,
        "training_cpu_seconds": 0.9,
        "evaluation_seconds": 1.0,
        "peak_memory_mib": 10.0,
        "largest_batch": None,
    }
    path = folder / f"{task}-{method}-{seed}" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    return path


def row_of(text: str, title: str) -> list[str]:
    """Cells of the first row of a table that begins with a title."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_papers_averages_are_those_of_its_tasks():
    for method, average in PAPER["average"].items():
        assert set(PAPER["accuracy"][method]) == set(TASKS)
        assert sum(PAPER["accuracy"][method].values()) / len(TASKS) == pytest.approx(average, abs=0.005)


def test_tables_hold_what_was_run_and_nothing_else(tmp_path, capsys):
    for seed, accuracy in enumerate((0.25, 0.5, 0.75)):
        write_run(tmp_path / "runs", "text", "adaptive", seed, accuracy)
    write_run(tmp_path / "runs", "listops", "standard", 0, 0.125)
    docs = tmp_path / "lra.md"
    docs.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    record = lra.main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "lra"), "--docs", str(docs)])
    text = capsys.readouterr().out
    assert row_of(text, "adaptive (ours)")[1:] == ["50.00 ± 25.00", "-", "-", "-", "-", "-"]
    standard = row_of(text, "Standard")[1:]
    assert standard == ["- (57.69)", "12.50 (38.15)", "- (80.10)", "- (73.59)", "- (37.97)", "- (57.50)"]
    assert row_of(text, "Skeinformer")[1] == "- (62.47)" and "Performer" not in text
    assert row_of(text, "most frequent label")[1:3] == ["50.00", "30.00"] and guess(record, "listops") == 30
    assert "| text | - | 3 of 50,000 | 4 of 128 |" in text

    rows = [row for row in record["rows"] if row["task"] == "text"]
    assert accuracies(rows) == [25, 50, 75]
    assert minutes(rows) == pytest.approx(1.8 / 3 * 1000 / 60) == 2 * minutes(rows, "training_cpu_seconds")
    assert record["commit"] == "c"
    assert json.loads((tmp_path / "lra.json").read_text()) == record
    assert (tmp_path / "lra.png").stat().st_size > 10_000
    assert docs.read_text() == f"before\n{BEGIN}\n\n{text.rstrip()}\n\n{END}\nafter\n"

    again = ["report", "--output", str(tmp_path / "lra"), "--docs", str(docs), "--check"]
    assert lra.main(again) == record
    docs.write_text(docs.read_text().replace("50.00", "51.00"))
    with pytest.raises(InputError, match="is not what the record says"):
        lra.main(again)
    docs.write_text("no markers")
    with pytest.raises(InputError, match="must hold the lines"):
        lra.main(again[:-1])
    assert docs.read_text() == "no markers"


def test_an_average_needs_all_tasks(tmp_path, capsys):
    for task in TASKS:
        write_run(tmp_path / "runs", task, "skeinformer", 0, 0.5)
    lra.main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "lra")])
    assert row_of(capsys.readouterr().out, "Skeinformer")[-1] == "50.00 (58.08)"


@pytest.mark.parametrize(
    ("changes", "message"), [({"steps": 4}, "settings: steps"), ({"batch_size": 8, "x": 1}, "settings: batch_size, x")]
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, changes, message):
    write_run(tmp_path, "text", "standard", 0, 0.5)
    write_run(tmp_path, "text", "adaptive", 0, 0.5, **changes)
    with pytest.raises(InputError, match=message):
        merge([tmp_path])


def test_other_hardware_and_double_runs_are_refused(tmp_path):
    path = write_run(tmp_path / "a", "text", "standard", 0, 0.5)
    record = json.loads(path.read_text())
    write_run(tmp_path / "b", "text", "standard", 0, 0.5)
    with pytest.raises(InputError, match="two runs of text, standard, 0"):
        merge([tmp_path])
    other = copy.deepcopy(record) | {"hardware": {"cpu": "y", "threads": 1, "gpu": None}}
    path.write_text(json.dumps(other))
    with pytest.raises(InputError, match="hardware: cpu"):
        merge([tmp_path])
    with pytest.raises(InputError, match="There is no record"):
        merge([tmp_path / "nowhere"])


def test_the_docs_name_every_method_and_task():
    text = (ROOT / "docs" / "lra.md").read_text()
    for name in (*METHODS, *TASKS):
        assert f"`{name}`" in text


def test_the_docs_are_what_the_record_says():
    arguments = ["--output", str(ROOT / "benchmarks" / "results" / "lra_cpu"), "--docs", str(ROOT / "docs" / "lra.md")]
    lra.main(["report", *arguments, "--check"])
