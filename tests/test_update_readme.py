import json
import re
import shutil
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import update_readme


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the documents and records, which a test may spoil."""
    for place in {place for place, _, _ in update_readme.PLACES}:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(update_readme.ROOT / place, tmp_path / place)
    shutil.copytree(update_readme.RESULTS, tmp_path / "results")
    monkeypatch.setattr(update_readme, "ROOT", tmp_path)
    monkeypatch.setattr(update_readme, "RESULTS", tmp_path / "results")
    return tmp_path


def test_the_documents_say_what_the_records_say(capsys):
    assert update_readme.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("document", sorted({place for place, _, _ in update_readme.PLACES}))
def test_a_figure_that_drifted_is_found_and_mended(copy, capsys, document):
    names = [name for place, name, _ in update_readme.PLACES if place == document]
    for name in names:
        text = (copy / document).read_text()
        begin = text.index(f"<!-- {name}: begin -->")
        end = text.index(f"<!-- {name}: end -->", begin)
        at = begin + max(m.end() - 1 for m in re.finditer(r"\d\.\d+|\d+(?= %)", text[begin:end]))  # a digit of a figure
        spoilt = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        (copy / document).write_text(spoilt)
        assert update_readme.main(["--check"]) == 1
        assert f"{document}: {name} is not what the record says" in capsys.readouterr().err
        assert (copy / document).read_text() == spoilt
        assert update_readme.main([]) == 0
        assert (copy / document).read_text() == text
    assert update_readme.main(["--check"]) == 0


def test_the_readme_follows_its_records(copy):
    path = copy / "results" / "encoder_minilm.json"
    record = json.loads(path.read_text())
    for row in record["crossover"]:
        row["tokens"] = 12345 if row["pass"] == "inference" else 6789
    path.write_text(json.dumps(record))
    assert update_readme.main(["--check"]) == 1
    update_readme.main([])
    text = " ".join((copy / "README.md").read_text().split())
    assert "faster than exact attention from 12,345 tokens on in inference and from 6,789 in training" in text


def test_figures_of_the_readme_are_in_the_records():
    readme = (update_readme.ROOT / "README.md").read_text()
    speed = json.loads((update_readme.RESULTS / "speed_cpu.json").read_text())
    default = next(name for name, config in speed["methods"].items() if update_readme.settings(config) == "default")
    cells = re.search(r"^\| default \|(.*)\|$", readme, re.M)[1].split("|")
    rows = [row for row in speed["rows"] if row["method"] == default and "forward_speedup" in row]
    assert len(cells) == len(rows) == 4
    for cell, row in zip(cells, rows, strict=True):
        assert cell.split()[0] == f"{row['forward_speedup']:.1f}" and f"({row['error']:.2f})" in cell
    embeddings = json.loads((update_readme.RESULTS / "embeddings.json").read_text())
    for title, case in (("truncated at 512, exact", "truncated"), ("up to 2,048 tokens, skein", "skein")):
        (row,) = (row for row in embeddings["rows"] if row["case"] == case)
        assert f"| {title} | {100 * row['accuracy']:.1f} ± {100 * row['accuracy_std']:.1f} % |" in readme


def test_settings_are_told_by_what_they_change():
    default = update_readme.SkeinConfig(min_length=0).to_dict()
    assert update_readme.settings(default) == "default"
    changed = {**default, "num_columns": 256, "method": "skeinformer"}
    assert update_readme.settings(changed) == '`method="skeinformer", num_columns=256`'


def test_a_place_that_is_missing_is_an_error(copy):
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace("<!-- speeds: end -->", ""))
    with pytest.raises(ValueError, match="has 0 places between `<!-- speeds: begin -->`"):
        update_readme.main(["--check"])


def test_what_the_documents_say_of_figure_1_is_in_its_record():
    record = json.loads((update_readme.RESULTS / "figure1.json").read_text())
    errors = {(row["weights"], row["n"], row["features"], row["method"]): row["spectral"] for row in record["summary"]}
    framework = ("vmean", "linformer", "linformer-jl", "informer", "performer")
    positional = ("nystromformer", "bigbird", "longformer")
    for weights, n, d in dict.fromkeys(place[:3] for place in errors):
        error = {place[3]: e for place, e in errors.items() if place[:3] == (weights, n, d)}
        order = sorted(error, key=error.get)
        assert order[0].startswith("adaptive") and order[1].startswith("adaptive")
        assert error["vmean"] < error["linformer"]
        if weights == "random":
            assert error["adaptive"] < 1e-3
            assert order[-1] == "linformer"
            assert min(error[m] for m in ("linformer-jl", "longformer", "bigbird")) > error["vmean"]
            continue
        is_best = error["skeinformer"] < min(error[method] for method in framework)
        assert is_best == (d >= (64 if n == 1024 else 128))
        assert error["vmean"] < error["linformer-jl"] or d >= 512
        if 32 <= d < n / 4:
            assert error["skeinformer"] > max(error[method] for method in positional)
        elif d == n // 4:
            assert error["nystromformer"] < error["skeinformer"] < error["longformer"]
        elif d == n // 2:
            assert n > 1024 or error["skeinformer"] < min(error[method] for method in positional)
        if d == 8:
            others = (
                e for (w, m, f, name), e in errors.items() if (w, m, f) == (weights, n, 64) and name[0:8] != "adaptive"
            )
            assert error["adaptive"] < min(others)
