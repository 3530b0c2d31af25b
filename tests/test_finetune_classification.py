"""scripts/finetune_classification.py: labels, sets of labels and numbers; what it refuses."""

import json
import random
from pathlib import Path

import pytest
import torch
from _data import InputError
from _finetuning import finetune, make_parser
from _metrics import LabelSets
from finetune_classification import Classification
from tiny_encoder import make_documents, make_encoder, options, read_jsonl, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"), BertForSequenceClassification)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """80 documents."""
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    return write_jsonl(path, [{"text": text, "label": label} for text, label in make_documents(80)])


@torch.no_grad()
def predict_again(output: Path, attn: str, texts: list[str]) -> tuple[BertForSequenceClassification, torch.Tensor]:
    """The model that was saved, and its logits."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForSequenceClassification.from_pretrained(output, attn_implementation=attn).eval()
    assert model.config.max_position_embeddings == tokenizer.model_max_length
    return model, model(**tokenizer(texts, truncation=True, padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("attn", ["sdpa", "skein"])
def test_training_learns_and_the_saved_model_reloads(tmp_path, encoder, reviews, attn):
    output = tmp_path / "run"
    more = ["--attn", attn, "--epochs", 4, "--max-length", 72]  # more than the 64 positions of the encoder
    if attn == "skein":
        more += ["--skein-min-length", 0, "--skein-num-columns", 8, "--skein-block-size", 32, "--skein-exact-rows", 2]
        more += ["--skein-num-strata", 4]
    record = finetune(Classification, options(encoder, reviews, output, *more))

    assert len(record["losses"]) == 32 and [metrics["step"] for metrics in record["validation"]] == [8, 16, 24, 32]
    assert sum(record["losses"][-4:]) < 0.5 * sum(record["losses"][:4])
    assert record["test"]["accuracy"] > 0.8
    assert record["lengths"]["train"]["documents"] == 64 and record["lengths"]["train"]["truncated"] > 0
    saved = (output / "record.json").read_text()
    assert json.loads(saved) == json.loads(json.dumps(record))
    assert (output / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    for file in ("record.json", "config.json", "tokenizer_config.json"):
        assert str(tmp_path.parent.parent) not in (output / file).read_text()
    if attn == "skein":
        assert record["skein"]["num_columns"] == 8 and record["skein"]["exact_rows"] == 2

    table = read_jsonl(output / "test_predictions.jsonl")
    documents = make_documents(80)
    model, logits = predict_again(output, attn, [documents[int(row["name"])][0] for row in table])
    assert model.config.id2label == {0: "neg", 1: "pos"} and model.config.label2id == {"neg": 0, "pos": 1}
    assert model.config.max_position_embeddings == 72
    assert [model.config.id2label[i] for i in logits.argmax(-1).tolist()] == [row["prediction"] for row in table]
    assert [documents[int(row["name"])][1] for row in table] == [row["label"] for row in table]
    targets = torch.tensor([model.config.label2id[row["label"]] for row in table])
    assert torch.nn.functional.cross_entropy(logits, targets).item() == pytest.approx(record["test"]["loss"], abs=1e-4)


@pytest.mark.parametrize("separated", [False, True])
def test_sets_of_labels(tmp_path, encoder, separated):
    """A document has the label of each word that is in it."""
    draw = random.Random(1)
    rows = []
    for _ in range(64):
        labels = [name for name in ("awful", "dull", "great") if draw.random() < 0.5]
        text = " ".join(draw.choices(["w1", "w2"], k=6) + labels * 3)
        rows.append({"text": text, "label": "; ".join(labels) if separated else labels})
    path = write_jsonl(tmp_path / "sets.jsonl", rows)
    more = ["--problem", "multi-label", "--epochs", 1 if separated else 14] + (
        ["--label-separator", ";"] if separated else []
    )
    record = finetune(Classification, options(encoder, path, tmp_path / "run", *more))

    assert record["labels"] == ["awful", "dull", "great"]
    assert record["test"].keys() >= {"micro_f1", "macro_f1", "accuracy", "loss"}
    assert separated or record["test"]["micro_f1"] > 0.8
    table = read_jsonl(tmp_path / "run" / "test_predictions.jsonl")
    model, logits = predict_again(tmp_path / "run", "sdpa", [rows[int(row["name"])]["text"] for row in table])
    assert model.config.problem_type == "multi_label_classification"
    for row, own in zip(table, logits, strict=True):
        assert row["prediction"] == [model.config.id2label[i] for i in range(3) if own[i] > 0]


def test_numbers(tmp_path, encoder):
    """The number of a document is the share of a word in it."""
    draw = random.Random(2)
    rows = []
    for _ in range(80):
        count = draw.randint(0, 20)
        rows.append({"text": " ".join(["dull"] * count + ["w1"] * (20 - count)), "label": count / 10 - 1})
    path = write_jsonl(tmp_path / "numbers.jsonl", rows)
    more = ["--problem", "regression", "--epochs", 8, "--learning-rate", "5e-3"]
    record = finetune(Classification, options(encoder, path, tmp_path / "run", *more))

    assert record["test"]["loss"] < 0.1 and record["test"]["rmse"] ** 2 == pytest.approx(record["test"]["loss"])
    assert min(record["validation"], key=lambda m: m["loss"])["step"] == record["best_step"]
    table = read_jsonl(tmp_path / "run" / "test_predictions.jsonl")
    model, logits = predict_again(tmp_path / "run", "sdpa", [rows[int(row["name"])]["text"] for row in table])
    assert model.config.problem_type == "regression" and logits.shape == (8, 1)
    torch.testing.assert_close(logits[:, 0], torch.tensor([row["prediction"] for row in table]), atol=1e-4, rtol=0)


BAD = {
    "no column": ([{"text": "a", "other": "b"}], [], "no column label; it has text, other"),
    "no text": ([{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], [], "1 of 2 documents have no text, first"),
    "no label": ([{"text": "a", "label": "x"}, {"text": "b"}], [], "1 of 2 documents have no label, first '1'"),
    "one class": ([{"text": "a", "label": "x"}] * 20, [], "have the label 'x'"),
    "few": ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], [], "no validation documents"),
    "a set": ([{"text": "a", "label": ["x"]}], [], "have a list of labels; see --problem multi-label"),
    "no set": ([{"text": "a", "label": "x"}], ["--problem", "multi-label"], "give --label-separator"),
    "no place": (
        [{"text": "a", "label": ["x", None]}],
        ["--problem", "multi-label"],
        "have a list of labels with an empty place",
    ),
    "one of two": ([{"text": "a", "label": "y"}] * 20, ["--labels", "x", "y"], "have the label 'y'"),
    "no number": ([{"text": "a", "label": "x"}], ["--problem", "regression"], "have a label that is no number"),
    "mixed": (
        [{"text": "a", "label": "x"}, {"text": "b", "label": 1}],
        [],
        r"column label mixes text \(first in '0'\) and number \(first in '1'\)",
    ),
    "outside": ([{"text": "a", "label": "x"}], ["--labels", "y", "z"], "have a label that is not among --labels"),
    "stream": ([{"text": "a", "label": "x"}], ["--streaming", "--max-steps", "2"], "needs --labels"),
}


@pytest.mark.parametrize(("rows", "more", "message"), BAD.values(), ids=BAD)
def test_bad_rows_are_refused_before_anything_is_written(tmp_path, encoder, rows, more, message):
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    if "--streaming" in more:
        more = [*more, "--validation-file", path]
    with pytest.raises(InputError, match=message):
        finetune(Classification, options(encoder, path, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_label_unknown_in_training(tmp_path, encoder, reviews):
    path = write_jsonl(tmp_path / "test.jsonl", [{"text": "a", "label": "pos"}, {"text": "b", "label": "other"}])
    with pytest.raises(InputError, match="The labels other of test documents"):
        finetune(Classification, options(encoder, reviews, tmp_path / "run", "--test-file", path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--skein-colour", "3"], "unrecognized arguments: --skein-colour"),
        (["--skein-layers", "3"], "no JSON object"),
        (["--epochs", "0"], "not an integer above 0"),
        (["--learning-rate", "-1"], "not a number above 0"),
        (["--learning-rate", "nan"], "not a number above 0"),
        (["--max-gradient-norm", "0"], "not a number above 0"),
        (["--weight-decay", "-0.1"], "not a number of 0 or more"),
        (["--seed", "-1"], "not from 0 to 2**32 - 1"),
        (["--test-fraction", "1"], "not in [0, 1)"),
        (["--fold-regex", r"\d"], "no group in parentheses"),
        (["--fold-regex", "("], "no regular expression"),
    ],
)
def test_bad_option(capsys, more, message):
    with pytest.raises(SystemExit):
        make_parser(Classification).parse_args(["--model", "m", "--dataset", "x", "--output-dir", "o", *more])
    assert message in capsys.readouterr().err


def test_f1_of_a_single_label():
    """Nothing found, one of ten there: F1 is 0. scikit-learn would count the nine zeros as right."""
    found = LabelSets().compute(predictions=[[0]] * 10, references=[[1], *[[0]] * 9])
    assert found == {"micro_f1": 0.0, "macro_f1": 0.0, "accuracy": 0.9}
    found = LabelSets().compute(predictions=[[1], [1], [0]], references=[[1], [0], [0]])
    assert found["micro_f1"] == found["macro_f1"] == pytest.approx(2 / 3)
