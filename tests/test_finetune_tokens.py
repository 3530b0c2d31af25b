"""scripts/finetune_tokens.py: labels at first tokens, entities, truncation; what it refuses."""

import argparse
import random

import pytest
import torch
from _data import InputError
from _finetuning import finetune
from finetune_tokens import TokenClassification
from tiny_encoder import make_encoder, options, read_jsonl, write_jsonl
from transformers import AutoModelForTokenClassification, AutoTokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def make_rows(count: int, longest: int = 40) -> list[dict]:
    """`great dull` is an entity of two words, `fresh` of one."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        tokens, tags = [], []
        while len(tokens) < draw.randint(6, longest):
            chosen = draw.choice([["great", "dull"], ["fresh"], ["w1"], ["w2"], ["w3"]])
            tokens += chosen
            tags += {"great": ["B-A", "I-A"], "fresh": ["B-B"]}.get(chosen[0], ["O"])
        rows.append({"words": tokens, "ner_tags": tags})
    return rows


NAMES = ("--tokens-column", "words", "--tags-column", "ner_tags")


def test_labels_stand_at_the_first_tokens(encoder):
    args = argparse.Namespace(tags=["O", "B-A", "I-A"], max_length=8)
    task = TokenClassification(args)
    task.tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = [{"tokens": ["great", "w1", "dull", "great", "w2", "w3"], "tags": ["B-A", "O", "I-A", "O", "O", "O"]}]
    (encoded,) = task.encode(rows)
    tokens = task.tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["[CLS]", "grea", "##t", "w1", "dull", "grea", "##t", "[SEP]"]
    assert encoded["labels"] == [-100, 1, -100, 0, 2, 0, -100, -100]
    assert encoded["words"] == [0, 1, 2, 3] and encoded["length"] == 10
    batch = task.collate([encoded, encoded])
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 8) and task.weight(batch) == 8


def test_training_learns_entities(tmp_path, encoder):
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(64, longest=70))
    more = (*NAMES, "--epochs", 3, "--max-length", 72)
    record = finetune(TokenClassification, options(encoder, path, tmp_path / "run", *more))
    assert record["tags"] == ["B-A", "B-B", "I-A", "O"]
    assert sum(record["losses"][-4:]) < 0.5 * sum(record["losses"][:4])
    assert record["test"]["f1"] > 0.8 and record["test"].keys() >= {"precision", "recall", "accuracy", "loss"}

    output = tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForTokenClassification.from_pretrained(output).eval()
    rows = read_jsonl(output / "test_predictions.jsonl")
    losses = []
    for row in rows:
        inputs = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, return_tensors="pt")
        words = inputs.word_ids(0)
        first = [i for i, word in enumerate(words) if word is not None and word != words[i - 1]]
        with torch.no_grad():
            logits = model(**inputs).logits[0, first]
        predicted = [model.config.id2label[i] for i in logits.argmax(-1).tolist()]
        assert row["prediction"] == predicted + ["O"] * (len(row["tokens"]) - len(first))
        targets = torch.tensor([model.config.label2id[tag] for tag in row["tags"][: len(first)]])
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert torch.cat(losses).mean().item() == pytest.approx(record["test"]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": [], "ner_tags": []}, "have no words"),
        ({"words": "a b", "ner_tags": ["O", "O"]}, "have tokens that are no list of words"),
        ({"words": ["a", " "], "ner_tags": ["O", "O"]}, "have tokens that are no list of words"),
        ({"words": ["a", "b"], "ner_tags": ["O"]}, "have not one tag for each word"),
        ({"words": ["a", "b"], "ner_tags": None}, "have not one tag for each word"),
    ],
)
def test_bad_row(tmp_path, encoder, row, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match=f"1 of 1 documents {message}"):
        finetune(TokenClassification, options(encoder, path, tmp_path / "run", *NAMES))
    assert not (tmp_path / "run").exists()


def test_bad_tags(tmp_path, encoder):
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(8))
    with pytest.raises(InputError, match="8 of 8 documents have a tag that is not among --tags"):
        finetune(TokenClassification, options(encoder, path, tmp_path / "run", *NAMES, "--tags", "X"))
    other = write_jsonl(tmp_path / "other.jsonl", [{"words": ["a"], "ner_tags": ["B-C"]}])
    with pytest.raises(InputError, match="The tags B-C of test documents do not occur in training"):
        more = (*NAMES, "--validation-fraction", 0.2, "--test-file", other)
        finetune(TokenClassification, options(encoder, path, tmp_path / "run", *more))
