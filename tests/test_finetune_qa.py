"""scripts/finetune_qa.py: spans, questions without an answer, truncation, the metric; what it refuses."""

import argparse
import random

import numpy as np
import pytest
import torch
from _data import InputError
from _finetuning import finetune
from _metrics import Answers
from finetune_qa import NOWHERE, QuestionAnswering, best_span
from tiny_encoder import make_encoder, options, read_jsonl, write_jsonl
from transformers import AutoModelForQuestionAnswering, AutoTokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def make_rows(count: int, longest: int = 30) -> list[dict]:
    """The answer is the two words from `great` on, wherever they are; a fifth of the contexts have none."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        words = [f"w{draw.randrange(20)}" for _ in range(draw.randint(10, longest))]
        answers = {"text": [], "answer_start": []}
        if i % 5:
            at = draw.randrange(len(words) - 1)
            words[at] = "great"
            answers = {"text": [f"great {words[at + 1]}"], "answer_start": [len(" ".join([*words[:at], ""]))]}
        rows.append({"question": "fresh", "context": " ".join(words), "answers": answers})
    return rows


def make_task(encoder: str, max_length: int) -> QuestionAnswering:
    task = QuestionAnswering(argparse.Namespace(max_length=max_length, max_answer_tokens=5))
    task.tokenizer = AutoTokenizer.from_pretrained(encoder)
    return task


def test_spans_are_tokens(encoder):
    task = make_task(encoder, 10)
    rows = [
        {"name": str(i), "question": "dull", "context": "w1 great w2 w3 w4 w5", "answers": answers}
        for i, answers in enumerate(
            [
                {"text": ["great w2"], "answer_start": [3]},
                {"text": [], "answer_start": []},
                {"text": ["w5"], "answer_start": [18]},
                {"text": ["w5", "w1"], "answer_start": [18, 0]},
                {"text": [" w2 "], "answer_start": [8]},
            ]
        )
    ]
    encoded = task.encode(rows)
    tokens = task.tokenizer.convert_ids_to_tokens(encoded[0]["input_ids"])
    assert tokens == ["[CLS]", "dull", "[SEP]", "w1", "grea", "##t", "w2", "w3", "w4", "[SEP]"]
    spans = [(row["start_positions"], row["end_positions"]) for row in encoded]
    assert spans == [(4, 6), (0, 0), (NOWHERE, NOWHERE), (3, 3), (6, 6)]
    assert [row["lost"] for row in encoded] == [False, False, True, False, False]
    assert task.counts(encoded) == {"answers_truncated": 1}
    assert encoded[0]["length"] == 11 and (encoded[0]["first"], encoded[0]["last"]) == (3, 8)
    assert task.weight(task.collate(encoded)) == 4


def test_loss_is_that_of_the_model_without_padding(encoder):
    task = make_task(encoder, 40)
    model = AutoModelForQuestionAnswering.from_pretrained(encoder)
    rows = [{"name": str(i), **row} for i, row in enumerate(make_rows(12, longest=80))]
    batch = task.collate(task.encode(rows))
    lengths = batch["attention_mask"].sum(1).tolist()
    weights = (batch["start_positions"] != NOWHERE).tolist()
    assert len(set(lengths)) > 1 and len(set(weights)) == 2
    expected = [
        model(
            input_ids=batch["input_ids"][i : i + 1, :n],
            start_positions=batch["start_positions"][i : i + 1],
            end_positions=batch["end_positions"][i : i + 1],
        ).loss
        for i, n in enumerate(lengths)
        if weights[i]
    ]
    torch.testing.assert_close(task.forward(model, batch).loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_best_span_is_the_best_of_all():
    draw = np.random.default_rng(0)
    for n in (1, 2, 9):
        for most in (1, 3, 20):
            start, end = draw.normal(size=(2, n))
            scores = {(i, j): start[i] + end[j] for i in range(n) for j in range(i, min(n, i + most))}
            span, score = best_span(start, end, most)
            assert span == max(scores, key=scores.get) and score == pytest.approx(max(scores.values()))
    assert best_span(np.empty(0), np.empty(0), 3) == (None, -np.inf)


def test_metric_is_that_of_squad():
    predictions = ["The Cat, sat!", "big cat", "", "cat", "dog"]
    references = [["a cat sat"], ["dog", "cat"], [], [], ["cat"]]
    found = Answers().compute(predictions=predictions, references=references)
    assert found["exact_match"] == pytest.approx(2 / 5)
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 1) / 5)


def test_training_learns_to_answer(tmp_path, encoder, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(100, longest=80))
    more = ("--epochs", 8, "--learning-rate", "1e-2", "--validation-fraction", 0.1)
    record = finetune(QuestionAnswering, options(encoder, path, tmp_path / "run", *more))
    lost = record["lengths"]["train"]["answers_truncated"]
    assert lost > 0 and f"train: {lost} of 80 documents, answers truncated" in capsys.readouterr().out
    assert sum(record["losses"][-8:]) < 0.5 * sum(record["losses"][:8])

    output = tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForQuestionAnswering.from_pretrained(output).eval()
    rows, data = read_jsonl(output / "test_predictions.jsonl"), make_rows(100, longest=80)
    for row in rows:
        source = data[int(row["name"])]
        pair = (source["question"], source["context"])
        inputs = tokenizer(*pair, truncation="only_second", return_tensors="pt", return_offsets_mapping=True)
        inside = [i for i, part in enumerate(inputs.sequence_ids(0)) if part == 1]
        offsets = inputs.pop("offset_mapping")[0]
        with torch.no_grad():
            found = model(**inputs)
        start, end = found.start_logits[0], found.end_logits[0]
        scores = {(i, j): start[i] + end[j] for i in inside for j in inside if i <= j < i + 30}
        i, j = max(scores, key=scores.get)
        is_null = start[0] + end[0] >= scores[i, j]
        assert row["prediction"] == ("" if is_null else source["context"][offsets[i][0] : offsets[j][1]])
    predictions, references = [row["prediction"] for row in rows], [row["answers"] for row in rows]
    assert Answers().compute(predictions=predictions, references=references)["f1"] == record["test"]["f1"]
    assert any(predictions)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": " ", "context": "a", "answers": None}, "have no question"),
        ({"question": "a", "context": "", "answers": None}, "have no context"),
        ({"question": "a", "context": "b", "answers": None}, "have no answers; where there is none"),
        ({"question": "a", "context": "b", "answers": ""}, "have no answers"),
        ({"question": "a", "context": "b", "answers": {"text": ["b"]}}, "have answers that are not"),
        ({"question": "a", "context": "b", "answers": "{"}, "have answers that are no JSON"),
        (
            {"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": []}},
            "have answers that are not",
        ),
        ({"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [1]}}, "is not in the context"),
    ],
)
def test_bad_row(tmp_path, encoder, row, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match=message):
        finetune(QuestionAnswering, options(encoder, path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_question_that_leaves_no_room(encoder):
    task = make_task(encoder, 8)
    row = {"name": "7", "question": "w1 w2 w3 w4 w5", "context": "w1", "answers": {"text": [], "answer_start": []}}
    with pytest.raises(InputError, match="question of document '7' has 5 tokens and leaves no room"):
        task.encode([row])
