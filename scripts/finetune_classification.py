"""Fine-tune a pretrained encoder to classify long documents (one label each) with sketched attention.

Two examples, the second with the usual folds of the film reviews of Pang and Lee (2004):

    python scripts/finetune_classification.py --model bert-base-uncased --dataset reviews.csv \\
        --max-length 4096 --output-dir runs/reviews
    python scripts/finetune_classification.py --model bert-base-uncased --dataset movie_reviews.zip \\
        --fold-regex 'cv(\\d)' --validation-fold 8 --test-fold 9 --max-length 1024 --output-dir runs/movies

Several processes: put `accelerate launch` in place of `python`. The folder given as --output-dir gets the model of the
epoch with the best validation accuracy, its tokenizer, test_predictions.csv and record.json.
"""

import argparse
import functools
import hashlib
import json
import math
import re
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from _finetuning import (
    InputError,
    add_model_arguments,
    add_training_arguments,
    fit,
    fraction,
    load_model,
    make_loader,
    positive_int,
    public_settings,
    run_record,
    save_run,
    start,
)
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, load_dataset
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)


PARTS = ("train", "validation", "test")
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def fold_regex(text: str) -> str:
    """An argument that is a regular expression with a group."""
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    if groups == 0:
        raise argparse.ArgumentTypeError(f"{text!r} has no group in parentheses, which would be the fold")
    return text


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --model MODEL --dataset DATASET --output-dir FOLDER [options]",
    )
    group = parser.add_argument_group(
        "data",
        "Validation and test documents come from a file, a split or a fold; else from the training documents.",
    )
    group.add_argument(
        "--dataset",
        required=True,
        help="a dataset on the Hub; a csv, tsv, jsonl, json or parquet file; or a folder or zip file with one folder "
        "of .txt files per label",
    )
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of a dataset on the Hub")
    group.add_argument("--text-column", default="text", metavar="NAME", help="default %(default)s")
    group.add_argument("--label-column", default="label", metavar="NAME", help="default %(default)s")
    group.add_argument("--train-split", default="train", metavar="SPLIT", help="default %(default)s (Hub only)")
    group.add_argument("--fold-regex", type=fold_regex, help="its first group, found in a file name, is the fold")
    for part in PARTS[1:]:
        source = group.add_mutually_exclusive_group()
        source.add_argument(f"--{part}-file", metavar="FILE", help="local, as --dataset")
        source.add_argument(f"--{part}-split", metavar="SPLIT", help="Hub only")
        source.add_argument(f"--{part}-fold", metavar="FOLD", help="needs --fold-regex")
        source.add_argument(
            f"--{part}-fraction", type=fraction, default=0.1, metavar="X", help="stratified (default %(default)s)"
        )
    for part in PARTS:
        group.add_argument(f"--max-{part}-documents", type=positive_int, metavar="N", help="stratified subset")
    add_model_arguments(parser)
    add_training_arguments(parser)
    return parser


# Documents


def load_documents(
    source: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    config: str | None = None,
    split: str = "train",
) -> Dataset:
    """Reads labelled documents from a table, from folders of text files or from the Hub.

    Args:
        source: A csv, tsv, jsonl, json or parquet file; a folder or a zip file with one folder of .txt files per
            label, at any depth; or the name of a dataset on the Hub.
        text_column: Column of the text, in a table or on the Hub.
        label_column: Column of the label.
        config: Configuration of a dataset on the Hub.
        split: Split of a dataset on the Hub.

    Returns:
        A dataset with the string columns `name` (the row, or the file within `source`), `text` and `label`.

    Raises:
        InputError: `source` cannot be read, a column is missing, or a document has no text or no label.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".zip", *TABLES) and not path.is_file():
        raise InputError(f"There is no file {source}.")
    try:
        if path.is_dir() or suffix == ".zip":
            names, texts, labels = _read_folders(path)
        else:
            columns = _read_table(path) if suffix in TABLES else _read_hub(str(source), config, split, label_column)
            missing = {text_column, label_column} - set(columns)
            if missing:
                raise InputError(f"{source} has no column {', '.join(sorted(missing))}; it has {', '.join(columns)}.")
            texts = columns[text_column]
            labels = [None if pd.isna(label) else str(label) for label in columns[label_column]]
            names = [str(row) for row in range(len(texts))]
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 ({error}); convert it, as with iconv.") from error
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{source} cannot be read: {error}") from error
    if not names:
        raise InputError(f"{source} holds no documents.")
    for what, values in (("text", texts), ("label", labels)):
        bad = [
            name for name, value in zip(names, values, strict=True) if not (isinstance(value, str) and value.strip())
        ]
        if bad:
            raise InputError(f"{source}: {len(bad)} of {len(names)} documents have no {what}, first {bad[0]!r}.")
    return Dataset.from_dict({"name": names, "text": texts, "label": labels})


def _read_table(path: Path) -> dict[str, list]:
    """The columns of a file; nothing is guessed, so that a document "NA" or a label "007" stays what it is."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return pd.read_parquet(path).to_dict("list")
    if suffix in (".csv", ".tsv"):
        separator = "\t" if suffix == ".tsv" else ","
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        return table.to_dict("list")
    content = path.read_text(encoding="utf-8-sig")
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in content.split("\n") if line.strip()]
    else:
        rows = json.loads(content)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} is not a list of objects.")
    return {column: [row.get(column) for row in rows] for column in dict.fromkeys(key for row in rows for key in row)}


def _read_hub(name: str, config: str | None, split: str, label_column: str) -> dict[str, list]:
    try:
        dataset = load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:  # OSError: also no connection
        raise InputError(f"{name} is no file or folder, and no dataset that loads from the Hub: {error}") from error
    columns = {column: list(dataset[column]) for column in dataset.column_names}
    feature = dataset.features.get(label_column)
    if isinstance(feature, ClassLabel):  # -1 is "no label" there
        columns[label_column] = [feature.names[i] if i is not None and i >= 0 else None for i in columns[label_column]]
    return columns


def _read_folders(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Names, texts and labels of the .txt files of a folder or zip file; the label is the folder a file lies in."""
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file.read_bytes for file in path.rglob("*") if file.is_file()}
    else:
        archive = zipfile.ZipFile(path)
        files = {item: functools.partial(archive.read, item) for item in archive.namelist() if not item.endswith("/")}
    # Hidden files, and the folder that macOS adds to zip files, are no documents; a .txt file above folders with .txt
    # files, such as a README.txt, has no label.
    names = [PurePosixPath(name) for name in sorted(files) if not re.search(r"(^|/)(\.|__MACOSX/)", name)]
    names = [name for name in names if name.suffix == ".txt"]
    above = {parent for name in names for parent in name.parent.parents}
    names = [name for name in names if name.parent not in above and name.parent.name]
    if len(names) < len(files):
        print(f"{path.name}: {len(files) - len(names)} of {len(files)} files are no labelled .txt documents, ignored.")
    texts = []
    for name in names:
        try:
            texts.append(files[str(name)]().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise InputError(f"{name} in {path} is not UTF-8 ({error}); convert it, as with iconv.") from error
    return [str(name) for name in names], texts, [name.parent.name for name in names]


def stratified_order(labels: list[str], seed: int) -> np.ndarray:
    """A random order `[n]` of the documents in which every beginning has about the label shares of the whole.

    Unlike scikit-learn's stratified splits it takes labels that occur once: those come in the middle.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    counts, seen = Counter(labels), Counter()
    position = []
    for i in order:
        position.append((seen[labels[i]] + 0.5) / counts[labels[i]])
        seen[labels[i]] += 1
    return order[np.argsort(position, kind="stable")]


def split_documents(args: argparse.Namespace) -> dict[str, Dataset]:
    """The training, validation and test documents the options ask for.

    Raises:
        InputError: A part has no documents, the training documents have one label only or lack one of the others.
    """
    load = functools.partial(
        load_documents, text_column=args.text_column, label_column=args.label_column, config=args.dataset_config
    )
    rest = load(args.dataset, split=args.train_split)
    parts, folds = {}, {}
    for part in PARTS[1:]:
        file, split, fold = (getattr(args, f"{part}_{kind}") for kind in ("file", "split", "fold"))
        if split and Path(args.dataset).exists():
            raise InputError(f"--{part}-split needs a dataset on the Hub; for {args.dataset} use --{part}-file.")
        if file or split:
            parts[part] = load(file) if file else load(args.dataset, split=split)
        elif fold is not None:
            folds[part] = fold
    if bool(folds) != bool(args.fold_regex):
        raise InputError("--fold-regex needs --validation-fold or --test-fold, and the other way round.")
    if folds:
        found = [re.search(args.fold_regex, name) for name in rest["name"]]
        if None in found:
            raise InputError(f"--fold-regex {args.fold_regex} is not in the name {rest['name'][found.index(None)]!r}.")
        fold_of = np.array([match.group(1) for match in found])
        parts |= {part: rest.select(np.flatnonzero(fold_of == fold)) for part, fold in folds.items()}
        rest = rest.select(np.flatnonzero(~np.isin(fold_of, list(folds.values()))))
    order, total = stratified_order(list(rest["label"]), args.seed), len(rest)
    for part in PARTS[1:]:
        if part not in parts:
            count = round(getattr(args, f"{part}_fraction") * total)
            parts[part] = rest.select(np.sort(order[:count]))
            order = order[count:]
    parts["train"] = rest.select(np.sort(order))
    for part, documents in parts.items():
        most = getattr(args, f"max_{part}_documents")
        if most is not None:
            parts[part] = documents.select(np.sort(stratified_order(list(documents["label"]), args.seed)[:most]))
    _check_labels(parts)
    return {part: parts[part] for part in PARTS}


def _check_labels(parts: dict[str, Dataset]) -> None:
    known = set(parts["train"]["label"])
    for part, documents in parts.items():
        if not len(documents):
            raise InputError(f"There are no {part} documents.")
        unknown = sorted(set(documents["label"]) - known)
        if unknown:
            raise InputError(f"The labels {', '.join(unknown)} of {part} documents do not occur in training.")
    if len(known) == 1:
        raise InputError(f"All training documents have the label {known.pop()!r}; there is nothing to learn.")


def tokenize(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, label2id: dict[str, int], max_length: int
) -> tuple[Dataset, dict[str, float]]:
    """The model's inputs with `labels`, and statistics of the untruncated lengths in tokens."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        whole = tokenizer(batch["text"], verbose=False)["input_ids"]
        inputs = tokenizer(batch["text"], truncation=True, max_length=max_length)
        labels = [label2id[label] for label in batch["label"]]
        return {**inputs, "labels": labels, "length": [len(tokens) for tokens in whole]}

    encoded = documents.map(encode, batched=True, batch_size=256, remove_columns=documents.column_names)
    lengths = np.array(encoded["length"])
    statistics = {
        "documents": len(lengths),
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "max": int(lengths.max()),
        "truncated": int((lengths > max_length).sum()),
    }
    return encoded.remove_columns("length"), statistics


# Evaluation


@torch.no_grad()
def predict(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[n, labels]` (float32) and labels `[n]` of the dataset, in its order, on every process."""
    model.eval()
    rows = []
    for batch in loader:
        index, labels = batch.pop("index"), batch.pop("labels")
        rows.append(accelerator.gather((index, labels, model(**batch).logits.float())))
    index, labels, logits = (torch.cat(column).cpu() for column in zip(*rows, strict=True))
    # With several processes Accelerate repeats documents to fill the last batches.
    first = np.unique(index.numpy(), return_index=True)[1]
    return logits[first], labels[first]


def classification_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy, macro F1 and cross-entropy of logits `[n, labels]`."""
    predictions = logits.argmax(-1)
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0)),
        "loss": nn.functional.cross_entropy(logits, labels).item(),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, tests and saves as the command line says; returns the record."""
    args = make_parser().parse_args(argv)
    accelerator = start(args)
    parts = split_documents(args)
    # "10" comes after "9".
    names = sorted(set(parts["train"]["label"]), key=lambda name: (int(name) if name.isdecimal() else math.inf, name))
    label2id = {name: i for i, name in enumerate(names)}
    tokenizer, model = load_model(
        AutoModelForSequenceClassification,
        args,
        id2label=dict(enumerate(names)),
        label2id=label2id,
        problem_type="single_label_classification",
    )
    encoded, lengths = {}, {}
    for part in PARTS:
        encoded[part], lengths[part] = tokenize(parts[part], tokenizer, label2id, args.max_length)
    # Padding to a multiple of 8 must not go past the last position.
    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if args.max_length % 8 == 0 else None)
    validation, test = (
        accelerator.prepare(make_loader(encoded[part], collator, args.batch_size)) for part in PARTS[1:]
    )

    def evaluate(model: nn.Module) -> dict[str, float]:
        return classification_metrics(*predict(accelerator, model, validation))

    digest = hashlib.sha256(json.dumps([documents.to_dict() for documents in parts.values()]).encode()).hexdigest()
    settings = public_settings(args, accelerator) | {"data_sha256": digest}
    model, progress = fit(accelerator, model, encoded["train"], collator, evaluate, "accuracy", args, settings)

    begin = time.perf_counter()
    logits, labels = predict(accelerator, model, test)
    test_seconds = time.perf_counter() - begin
    record = {
        **run_record(settings, accelerator.unwrap_model(model), progress),
        "labels": names,
        "lengths": lengths,
        "test": classification_metrics(logits, labels) | {"seconds": test_seconds},
    }
    accelerator.print("test: " + ", ".join(f"{name} {value:.4f}" for name, value in record["test"].items()))
    if accelerator.is_main_process:
        predictions = [names[i] for i in logits.argmax(-1)]
        table = {"name": parts["test"]["name"], "label": parts["test"]["label"], "prediction": predictions}
        pd.DataFrame({column: list(values) for column, values in table.items()}).to_csv(
            args.output_dir / "test_predictions.csv", index=False
        )
        save_run(args.output_dir, accelerator.unwrap_model(model), tokenizer, record)
    accelerator.end_training()
    return record


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
