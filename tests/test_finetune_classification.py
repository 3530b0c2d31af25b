"""scripts/finetune_classification.py: reading documents, training, resuming, and what it refuses."""

import importlib
import json
import random
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
finetune = importlib.import_module("finetune_classification")
finetuning = importlib.import_module("_finetuning")

POSITIONS = 64
WORDS = [f"w{i}" for i in range(20)]
SIGNS = {"neg": ["awful", "dull"], "pos": ["great", "fresh"]}


def make_documents(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 8 to 80 words, a third of them the signs of the label; the labels alternate."""
    draw = random.Random(seed)
    documents = []
    for i in range(count):
        label = sorted(SIGNS)[i % 2]
        words = [draw.choice(SIGNS[label] if draw.random() < 0.3 else WORDS) for _ in range(draw.randint(8, 80))]
        documents.append((" ".join(words), label))
    return documents


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A folder with a random BERT of 64 positions and its WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *SIGNS["neg"], *SIGNS["pos"]]
    wordpiece = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=wordpiece,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.1,  # with the usual 0.02 so narrow a model starts slowly
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """A jsonl file of 80 documents."""
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in make_documents(80)))
    return path


def options(encoder: str, dataset: Path, output: Path, *more: str) -> list[str]:
    """A short run with exact attention."""
    common = ["--model", encoder, "--dataset", str(dataset), "--output-dir", str(output)]
    return [*common, "--attn", "sdpa", "--epochs", "2", "--learning-rate", "1e-2", *more]


# Reading


def write_table(folder: Path, kind: str, documents: list[tuple[str, str]]) -> Path:
    path = folder / f"documents.{kind}"
    table = pd.DataFrame(documents, columns=["text", "label"])
    if kind == "jsonl":
        table.to_json(path, orient="records", lines=True)
    elif kind == "json":
        table.to_json(path, orient="records")
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    return path


def write_folders(folder: Path, documents: list[tuple[str, str]]) -> Path:
    for i, (text, label) in enumerate(documents):
        path = folder / "top" / label / f"cv{i:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (folder / "top" / "README").write_text("read me")
    (folder / "top" / "notes.txt").write_text("no label")
    return folder


def write_zip(folder: Path, documents: list[tuple[str, str]]) -> Path:
    source = write_folders(folder / "unpacked", documents)
    path = folder / "documents.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(source.rglob("*")):
            archive.write(file, file.relative_to(source))
        archive.writestr("__MACOSX/top/pos/._cv001.txt", b"\xff\xfe")
    return path


TRICKY = [
    ("NA", "007"),
    ('a "quoted", text\nof two lines', "007"),
    ("2020-01-01", "null"),
    ("naïve\u2028 text", "null"),
]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "zip", "folders"])
def test_every_format_gives_the_same_documents(tmp_path, capsys, kind):
    if kind in ("zip", "folders"):
        path = (write_zip if kind == "zip" else write_folders)(tmp_path, TRICKY)
    else:
        path = write_table(tmp_path, kind, TRICKY)
    documents = finetune.load_documents(path)
    assert list(zip(documents["text"], documents["label"], strict=True)) == TRICKY
    if kind == "zip":
        assert "3 of 7 files are no labelled .txt documents" in capsys.readouterr().out
        assert documents["name"][0] == "top/007/cv000.txt"


def test_hub_dataset_has_label_names(monkeypatch):
    rows = Dataset.from_dict({"sentence": ["a", "b"], "y": [1, 0]}).cast_column("y", ClassLabel(names=["no", "yes"]))
    monkeypatch.setattr(finetune, "load_dataset", lambda name, config, split: rows)
    documents = finetune.load_documents("some/dataset", "sentence", "y")
    assert list(documents["label"]) == ["yes", "no"]


def test_stratified_order():
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 9 + ["d"]
    order = finetune.stratified_order(labels, seed=3)
    assert sorted(order) == list(range(100))
    beginning = [labels[i] for i in order[:20]]
    assert [beginning.count(label) for label in "abcd"] == [12, 6, 2, 0]
    assert (order == finetune.stratified_order(labels, seed=3)).all()
    assert (order != finetune.stratified_order(labels, seed=4)).any()


def split(*more: str) -> dict[str, Dataset]:
    return finetune.split_documents(
        finetune.make_parser().parse_args(["--model", "m", "--output-dir", "o", *map(str, more)])
    )


def test_splits_are_disjoint_and_seeded(reviews):
    parts = split("--dataset", reviews)
    assert {part: len(documents) for part, documents in parts.items()} == {"train": 64, "validation": 8, "test": 8}
    assert len({name for documents in parts.values() for name in documents["name"]}) == 80
    assert list(parts["test"]["label"]).count("pos") == 4
    assert list(split("--dataset", reviews)["test"]["name"]) == list(parts["test"]["name"])
    assert list(split("--dataset", reviews, "--seed", "1")["test"]["name"]) != list(parts["test"]["name"])


def test_folds_files_and_subsets(tmp_path, reviews):
    path = write_zip(tmp_path, make_documents(60))
    folds = ("--dataset", path, "--fold-regex", r"cv0(\d)", "--test-fold", "5")
    parts = split(*folds, "--validation-fold", "4", "--max-train-documents", "10")
    assert all("/cv05" in name for name in parts["test"]["name"]) and len(parts["test"]) == 10
    assert all("/cv04" in name for name in parts["validation"]["name"]) and len(parts["validation"]) == 10
    assert len(parts["train"]) == 10 and list(parts["train"]["label"]).count("pos") == 5
    assert {len(documents) for documents in split(*folds, "--validation-file", reviews).values()} == {50, 80, 10}


# Training


def test_length_groups_cover_every_document_once():
    lengths = [random.Random(i).randint(1, 500) for i in range(203)]
    batches = finetuning.LengthGroupedBatches(lengths, 8, seed=1)
    first = list(batches)
    assert first == list(batches)
    assert sorted(i for batch in first for i in batch) == list(range(203))
    assert [len(batch) for batch in first] == [8] * 25 + [3]
    assert len(batches) == 26
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in first]
    assert sorted(spread)[13] < 100  # of 500 if the batches were random
    batches.epoch = 1
    assert first != list(batches)
    assert first != list(finetuning.LengthGroupedBatches(lengths, 8, seed=2))
    by_length = [lengths[i] for batch in finetuning.LengthGroupedBatches(lengths, 8) for i in batch]
    assert by_length == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("config_class", "model_class", "limit"), [(BertConfig, BertModel, 66), (RobertaConfig, RobertaModel, 64)]
)
def test_position_limit(config_class, model_class, limit):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = config_class(vocab_size=9, max_position_embeddings=66, pad_token_id=1, **sizes)
    model = model_class(config)
    assert finetuning.position_limit(model) == limit
    model(input_ids=torch.full((1, limit), 3))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 3))


@pytest.mark.parametrize("attn", ["sdpa", "skein"])
def test_training_learns_and_the_saved_model_reloads(tmp_path, encoder, reviews, attn):
    output = tmp_path / "run"
    more = ["--attn", attn, "--epochs", "4", "--max-length", "72"]  # more than the 64 positions of the encoder
    if attn == "skein":
        more += ["--min-length", "0", "--num-columns", "8", "--block-size", "8", "--skein", "exact_rows=2"]
    record = finetune.main(options(encoder, reviews, output, *more))

    assert len(record["losses"]) == 32 and len(record["validation"]) == 4
    assert sum(record["losses"][-4:]) < 0.5 * sum(record["losses"][:4])
    assert record["test"]["accuracy"] > 0.8
    assert record["lengths"]["train"]["documents"] == 64 and record["lengths"]["train"]["truncated"] > 0
    saved = (output / "record.json").read_text()
    assert json.loads(saved) == json.loads(json.dumps(record))
    for file in ("record.json", "config.json", "tokenizer_config.json"):
        assert str(tmp_path.parent.parent) not in (output / file).read_text()
    if attn == "skein":
        assert record["skein"]["num_columns"] == 8 and record["skein"]["exact_rows"] == 2

    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForSequenceClassification.from_pretrained(output, attn_implementation=attn).eval()
    assert model.config.id2label == {0: "neg", 1: "pos"} and model.config.label2id == {"neg": 0, "pos": 1}
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 72
    table = pd.read_csv(output / "test_predictions.csv", dtype={"name": int})
    documents = make_documents(80)
    inputs = tokenizer([documents[i][0] for i in table["name"]], truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert [model.config.id2label[i.item()] for i in logits.argmax(-1)] == list(table["prediction"])
    assert [documents[i][1] for i in table["name"]] == list(table["label"])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([model.config.label2id[x] for x in table["label"]]))
    assert loss.item() == pytest.approx(record["test"]["loss"], abs=1e-4)


def interrupt_after(monkeypatch, batches: int) -> None:
    """Makes the backward pass of a later batch end the run as Ctrl-C does."""
    backward, calls = Accelerator.backward, []

    def interrupted(self, loss, **kwargs):
        calls.append(loss)
        if len(calls) > batches:
            raise KeyboardInterrupt
        backward(self, loss, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", interrupted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, encoder, reviews) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    return output, finetune.main(options(encoder, reviews, output, *ACCUMULATE))


# 64 documents are 11 batches, 6 steps an epoch; the last step of an epoch is of one batch.
ACCUMULATE = ("--batch-size", "6", "--gradient-accumulation-steps", "2", "--save-every", "2")


@pytest.mark.parametrize("damaged", [None, "model.safetensors", "random_states_0.pkl", "sha256.json"])
def test_resumed_run_equals_the_uninterrupted(tmp_path, monkeypatch, capsys, encoder, reviews, uninterrupted, damaged):
    reference, expected = uninterrupted
    output = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 18)  # in step 10, the fourth of the second epoch
        finetune.main(options(encoder, reviews, output, *ACCUMULATE))
    checkpoints = output / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000006", "step-00000008"]
    (checkpoints / "step-00000010.partial").mkdir()
    if damaged:
        path = checkpoints / "step-00000008" / damaged
        path.write_bytes(path.read_bytes()[:-40])

    record = finetune.main(options(encoder, reviews, output, *ACCUMULATE, "--resume"))
    out = capsys.readouterr().out
    assert ("Skipping the checkpoint step-00000008" in out) == bool(damaged)
    assert f"Resuming from step-0000000{6 if damaged else 8}" in out
    for key in ("losses", "validation", "best_epoch"):
        assert record[key] == expected[key]
    weights, wanted = load_file(output / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)
    last = [folder / "checkpoints" / "step-00000012" / "model.safetensors" for folder in (output, reference)]
    assert last[0].read_bytes() == last[1].read_bytes()
    assert len(list(checkpoints.glob("step-*"))) == 2


def test_a_run_is_resumed_under_its_own_settings_only(encoder, reviews, uninterrupted):
    output, _ = uninterrupted
    with pytest.raises(finetuning.InputError, match=r"learning_rate \(was 0\.01, now 0\.1\)"):
        finetune.main(options(encoder, reviews, output, *ACCUMULATE, "--resume", "--learning-rate", "0.1"))


# Refusals


BAD_TABLES = {
    "no column": ("text,other\na,b\n", "has no column label; it has text, other"),
    "no documents": ("text,label\n", "holds no documents"),
    "no text": ("text,label\na,x\n  ,y\n", "1 of 2 documents have no text, first '1'"),
    "no label": ("text,label\na,x\nb,\n", "1 of 2 documents have no label"),
    "one class": ("text,label\n" + "a,x\n" * 20, "have the label 'x'"),
    "few documents": ("text,label\na,x\nb,y\n", "no validation documents"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_table(tmp_path, encoder, content, message):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(finetuning.InputError, match=message):
        finetune.main(options(encoder, path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no file"),
        ("latin.csv", "text,label\ncafé,x\n".encode("latin-1"), "not UTF-8"),
        ("latin.jsonl", '{"text": "café", "label": "x"}\n'.encode("latin-1"), "not UTF-8"),
        ("broken.jsonl", b'{"text": \n', "cannot be read"),
        ("broken.parquet", b"PAR1", "cannot be read"),
        ("broken.zip", b"PK", "cannot be read"),
        ("empty.csv", b"", "cannot be read"),
        ("object.json", b'{"text": "a"}', "not a list of objects"),
        ("null.jsonl", b'{"text": null, "label": 1}\n', "1 of 1 documents have no text"),
    ],
)
def test_unreadable_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(finetuning.InputError, match=message):
        finetune.load_documents(tmp_path / name)


def test_unreadable_text_file(tmp_path):
    write_folders(tmp_path, make_documents(4))
    (tmp_path / "top" / "pos" / "cv009.txt").write_bytes(b"caf\xe9")
    with pytest.raises(finetuning.InputError, match=r"top/pos/cv009\.txt .* is not UTF-8"):
        finetune.load_documents(tmp_path)


def test_label_unknown_in_training(tmp_path, reviews):
    path = tmp_path / "test.csv"
    path.write_text("text,label\na,pos\nb,other\n")
    with pytest.raises(finetuning.InputError, match="The labels other of test documents"):
        split("--dataset", reviews, "--test-file", path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fold-regex", r"(\d)"], "needs --validation-fold"),
        (["--test-fold", "1"], "needs --validation-fold"),
        (["--fold-regex", r"x(\d)", "--test-fold", "1"], "not in the name '0'"),
        (["--test-split", "test"], "use --test-file"),
    ],
)
def test_bad_split(reviews, more, message):
    with pytest.raises(finetuning.InputError, match=message):
        split("--dataset", reviews, *more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "no/such/folder"], "--model no/such/folder cannot be used"),
        (["--num-columns", "8"], "needs --attn skein"),
        (["--attn", "skein", "--num-columns", "0"], "num_columns is 0"),
    ],
)
def test_bad_model_option(tmp_path, encoder, reviews, more, message):
    with pytest.raises(finetuning.InputError, match=message):
        finetune.main(options(encoder, reviews, tmp_path / "run", *more))


def test_more_tokens_than_the_model_takes(tmp_path, monkeypatch, encoder, reviews):
    def refuse(*args, **kwargs):
        raise ValueError("It has no table.")

    monkeypatch.setattr(finetuning, "extend_positions", refuse)
    with pytest.raises(finetuning.InputError, match=r"the model takes 64 tokens. It has no table"):
        finetune.main(options(encoder, reviews, tmp_path / "run", "--max-length", "65"))


def test_output_folder_that_is_not_empty(encoder, reviews, uninterrupted):
    output, _ = uninterrupted
    with pytest.raises(finetuning.InputError, match="is not empty: add --resume or --overwrite"):
        finetune.main(options(encoder, reviews, output))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--skein", "colour=3"], "is not key=value with a key among backend"),
        (["--epochs", "0"], "not an integer above 0"),
        (["--test-fraction", "1"], "not in [0, 1)"),
        (["--fold-regex", r"\d"], "no group in parentheses"),
        (["--fold-regex", "("], "no regular expression"),
    ],
)
def test_bad_option(capsys, more, message):
    with pytest.raises(SystemExit):
        split("--dataset", "x", *more)
    assert message in capsys.readouterr().err
