"""scripts/demo.py: its letters cannot be understood from their first 512 tokens."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
demo = importlib.import_module("demo")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.find_minilm())


@pytest.fixture(scope="module")
def parts(tokenizer):
    return demo.write_letters(tokenizer, 2048, seed=0)


def points(letter) -> list[str]:
    """The sentences of a letter that decide, of either office."""
    return [sentence for sentences in demo.POINTS.values() for sentence in sentences if sentence in letter.text]


def test_truncation_cuts_off_the_whole_point(tokenizer, parts):
    for letter in (letter for letters in parts.values() for letter in letters):
        encoding = tokenizer(letter.text, truncation=True, max_length=demo.SHORT, return_offsets_mapping=True)
        kept = max(end for _, end in encoding["offset_mapping"])
        sentences = points(letter)
        assert len(encoding["input_ids"]) == demo.SHORT
        assert len(sentences) == 4 and set(sentences) < set(demo.POINTS[letter.label])
        assert kept < min(letter.text.index(sentence) for sentence in sentences)


def test_reported_place_of_the_point_is_right_and_fits(tokenizer, parts):
    for letter in parts["test"]:
        tokens = tokenizer(letter.text, verbose=False)["input_ids"]
        assert demo.SHORT <= letter.point_begin < letter.point_end < letter.tokens == len(tokens) <= 2048
        point = tokenizer.decode(tokens[letter.point_begin : letter.point_end])
        expected = sorted(points(letter), key=letter.text.index)
        assert point == tokenizer.decode(tokenizer(" ".join(expected), add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("part", ["train", "test"])
def test_beginning_does_not_depend_on_the_label(tokenizer, part):
    for seed in range(5):
        beginnings = [
            tokenizer(
                demo.write_letter(random.Random(seed), tokenizer, label, part).text,
                truncation=True,
                max_length=demo.SHORT,
            )["input_ids"]
            for label in demo.POINTS
        ]
        assert beginnings[0] == beginnings[1]


def test_small_talk_shares_no_sentence_with_the_points():
    assert not set(demo.SMALL_TALK) & {sentence for sentences in demo.POINTS.values() for sentence in sentences}


def test_labels_are_balanced(parts):
    for part, letters in parts.items():
        labels = [letter.label for letter in letters]
        assert len(labels) == demo.DOCUMENTS[part]
        assert all(labels.count(label) == len(labels) / len(demo.POINTS) for label in demo.POINTS)


def test_parts_are_disjoint_down_to_the_deciding_sentences(parts):
    letters = [letter.text for part in parts.values() for letter in part]
    assert len(set(letters)) == len(letters)
    seen = {sentence for part in ("train", "validation") for letter in parts[part] for sentence in points(letter)}
    assert not seen & {sentence for letter in parts["test"] for sentence in points(letter)}


def test_letters_are_a_function_of_the_seed(tokenizer, parts):
    assert demo.write_letters(tokenizer, 2048, seed=0) == parts
    assert demo.write_letters(tokenizer, 2048, seed=1)["train"] != parts["train"]


def test_letters_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"within 560.*--max-length"):
        demo.write_letters(tokenizer, 560, seed=0)


def test_skein_sketches_every_letter(parts, tmp_path, monkeypatch):
    given = []

    def finetune(task_class, arguments):
        given.append(arguments)
        (tmp_path / "checkpoints").mkdir()
        return {"test": {"accuracy": 1.0}, "training_seconds": 1.0}

    monkeypatch.setattr(demo, "run_finetuning", finetune)
    for attention in ("skein", "sdpa"):
        demo.finetune(tmp_path, tmp_path, tmp_path, attention, 2048, seed=0)
    skein, exact = given
    min_length = int(skein[skein.index("--skein-min-length") + 1])
    assert min_length < min(letter.tokens for letters in parts.values() for letter in letters)
    assert "--skein-min-length" not in exact


def test_the_demo_from_end_to_end(tmp_path, monkeypatch, capsys):
    """As `make demo` runs it, with few letters and short forward passes."""
    measure, measured = demo.compare_attention, []

    def compare_attention(folder, passes):
        measured.append(passes)
        return measure(folder, {64: 1, 2048: 1})

    monkeypatch.setattr(demo, "compare_attention", compare_attention)
    monkeypatch.setattr(demo, "DOCUMENTS", {"train": 2, "validation": 2, "test": 2})
    result = demo.main(["--max-length", "2048", "--output-dir", str(tmp_path)])
    assert measured == [{2048: 3, 8192: 3}] and result["forward"].keys() == {64, 2048}
    assert result["trained"].keys() == {"truncated", "full exact", "full skein"}
    assert result["reloaded"] == {"agree": 2, "documents": 2}
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["trained"] == result["trained"] and record["versions"]["transformers"] and record["hardware"]["cpu"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert "same label as before saving on 2 of 2 test letters" in capsys.readouterr().out
