"""scripts/film_reviews.py: from excerpts to the table, on a tiny encoder; what is complete is kept."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import film_reviews
import pytest
from _finetuning import finetune
from finetune_classification import Classification
from tiny_encoder import make_documents, make_encoder


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    make_encoder(folder / "encoder")
    for i, (text, label) in enumerate(make_documents(60)):
        path = folder / "reviews" / label / f"cv{i % 10}{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    given = {"model": folder / "encoder", "dataset": folder / "reviews", "runs": folder / "runs"}
    given |= {"output": folder / "films", "max-length": 96, "truncate": 32, "excerpt": 24, "min-length": 0}
    given |= {"train-documents": 16, "excerpt-epochs": 1, "excerpt-learning-rate": 3e-3, "threads": 1}
    given |= {"mixed-precision": "no"}  # which a process that has run without it cannot change
    return [*(f"--{name}={value}" for name, value in given.items()), "--seeds", "5", "--cases", "truncated", "skein-64"]


def test_runs_make_a_record_and_complete_ones_are_kept(options, capsys, monkeypatch):
    commands = []

    def run_first(command, **settings):
        """The others in this process, which saves their imports."""
        commands.append(command)
        return finetune(Classification, command[2:]) if len(commands) > 1 else subprocess.run(command, **settings)

    monkeypatch.setattr(film_reviews, "subprocess", SimpleNamespace(run=run_first))
    record = film_reviews.main(options)
    assert len(commands) == 3 and {command[1] for command in commands} == {str(film_reviews.SCRIPT)}
    assert [row["case"] for row in record["rows"]] == ["truncated", "skein-64"]
    truncated, skein = record["rows"]
    assert truncated["lengths"]["train"]["truncated"] > 0 and skein["lengths"]["train"]["truncated"] == 0
    assert truncated["skein"] is None and skein["skein"]["num_columns"] == 64 and skein["skein"]["min_length"] == 0
    for row in record["rows"]:
        assert len(row["losses"]) == 2 and row["seed"] == 5
        assert record["summary"][row["case"]]["accuracy"] == row["accuracy"]
    assert "skein, 64 columns" in capsys.readouterr().out

    output = Path(next(option for option in options if option.startswith("--output=")).partition("=")[2])
    assert json.loads(output.with_suffix(".json").read_text()) == json.loads(json.dumps(record))
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(film_reviews, "SCRIPT", Path("absent.py"))  # nothing is left to be run
    assert film_reviews.main(options)["rows"] == record["rows"]


def test_a_run_with_other_options_is_not_taken_for_this_one(options, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "command.json").write_text('["--epochs", "1"]')
    with pytest.raises(SystemExit, match="other options"):
        film_reviews.train(folder, ["--epochs", "2"], None)


def test_deviation_is_that_of_the_seeds():
    common = {"case": "exact", "loss": 1.0, "hardware": {"gpu": None}, "peak_memory_mib": 5.0}
    rows = [common | {"accuracy": a, "training_cpu_seconds": s} for a, s in ((0.5, 60), (0.7, 120), (0.6, 600))]
    found = film_reviews.summarize(rows)["exact"]
    assert found["accuracy"] == pytest.approx(0.6) and found["accuracy_std"] == pytest.approx(0.1)
    assert found["training_minutes"] == 2
