"""Data for fine-tuning: rows of a table, a folder of texts or the Hub, checked; whole or as a stream; in parts."""

import argparse
import codecs
import csv
import functools
import json
import math
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow.parquet
from datasets import ClassLabel, Dataset, IterableDataset, List, load_dataset


PARTS = ("train", "validation", "test")
TRAIN_SPLIT = "train"  # unless another is named
FRACTION = 0.1  # of the training documents, for a part that nothing else is given for
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")

Row = dict[str, Any]


class InputError(Exception):
    """The data or the options cannot be used; the message says what to change."""


# Options


def positive_int(text: str) -> int:
    """An argument that counts something: an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not an integer above 0")
    return value


def positive_float(text: str) -> float:
    """An argument that is a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def non_negative_float(text: str) -> float:
    """An argument that is a finite number, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return value


def random_seed(text: str) -> int:
    """An argument that NumPy takes for a seed: 32 bits."""
    value = int(text)
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2**32 - 1")
    return value


def fraction(text: str) -> float:
    """An argument from 0 (included) to 1 (excluded)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


def fold_regex(text: str) -> str:
    """An argument that is a regular expression with a group."""
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    if groups == 0:
        raise argparse.ArgumentTypeError(f"{text!r} has no group in parentheses, which would be the fold")
    return text


def add_data_arguments(parser: argparse.ArgumentParser, columns: Mapping[str, str]) -> None:
    """Adds the options that choose the data.

    Args:
        parser: Gets them.
        columns: What a row has to have, and what that is; each gets an option `--NAME-column`.
    """
    group = parser.add_argument_group(
        "data",
        "Validation and test documents come from a file, a split or a fold; else from the training documents.",
    )
    folders = "; or a folder or zip file of .txt files, the folder that a file lies in being its label"
    group.add_argument(
        "--dataset",
        required=True,
        help="a dataset on the Hub, or a csv, tsv, jsonl, json or parquet file"
        + (folders if columns.keys() <= {"text", "label"} else ""),
    )
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of a dataset on the Hub")
    for name, what in columns.items():
        group.add_argument(
            f"--{name}-column", default=name, metavar="NAME", help=f"column of the {what} (default %(default)s)"
        )
    group.add_argument("--train-split", default=TRAIN_SPLIT, metavar="SPLIT", help="default %(default)s (Hub only)")
    group.add_argument("--fold-regex", type=fold_regex, help="its first group, found in a file name, is the fold")
    for part in PARTS[1:]:
        source = group.add_mutually_exclusive_group()
        source.add_argument(f"--{part}-file", metavar="FILE", help="local, as --dataset")
        source.add_argument(f"--{part}-split", metavar="SPLIT", help="Hub only")
        source.add_argument(f"--{part}-fold", metavar="FOLD", help="needs --fold-regex")
        source.add_argument(
            f"--{part}-fraction",
            type=fraction,
            metavar="X",
            help=f"of the training documents (default {FRACTION})" + ("; 0: no test" if part == "test" else ""),
        )
    for part in PARTS:
        group.add_argument(f"--max-{part}-documents", type=positive_int, metavar="N", help="take a random subset")
    group.add_argument(
        "--streaming",
        action="store_true",
        help="read training documents as they are needed, for data larger than memory; needs --max-steps and a "
        "validation file or split",
    )
    group.add_argument(
        "--stream-buffer",
        type=positive_int,
        default=64,
        metavar="STEPS",
        help="streaming: documents are shuffled, and grouped by length, among those of so many steps "
        "(default %(default)s)",
    )


# Rows


def iter_rows(path: Path) -> Iterator[Row]:
    """The rows of a local table or folder, one by one; nothing is guessed: "NA" and "007" stay what they are.

    Raises:
        InputError: It is no table or folder of texts, or is not UTF-8.
    """
    suffix = path.suffix.lower()
    if suffix in (".zip", *TABLES) and not path.is_file():
        raise InputError(f"There is no file {path}.")
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".csv": functools.partial(_csv_rows, delimiter=","),
        ".tsv": functools.partial(_csv_rows, delimiter="\t"),
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
    }
    reader = readers.get(suffix, _folder_rows)
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); convert it, as with iconv.") from error
    except (ValueError, OSError, csv.Error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # by default 128 KiB, and a document may be longer
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        if not reader.fieldnames:
            raise ValueError("it is empty.")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has not the {len(reader.fieldnames)} fields of the first.")
            yield row


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(codecs.BOM_UTF8).decode() if number == 1 else line.decode()
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object.")
            yield row


def _json_rows(path: Path) -> Iterator[Row]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is not a list of objects.")
    yield from rows


def _parquet_rows(path: Path) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _folder_rows(path: Path) -> Iterator[Row]:
    """The .txt files of a folder or zip file as `name`, `text` and `label`, which is the folder a file lies in."""
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
    for name in names:
        try:
            text = files[str(name)]().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{name} in {path} is not UTF-8 ({error}); convert it, as with iconv.") from error
        except RuntimeError as error:  # what zipfile raises for a file that is encrypted
            raise InputError(f"{name} in {path} cannot be read ({error}); unpack it and name the folder.") from error
        yield {"name": str(name), "text": text, "label": name.parent.name}


def _hub(name: str, config: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:  # also no connection, and data sets that are scripts
        raise InputError(f"{name} is no file or folder, and no dataset that loads from the Hub: {error}") from error


def _named_labels(row: Row, features: Mapping[str, Any]) -> Row:
    """`row` with names for the numbers of labels; -1 is "no label" on the Hub."""

    def name(value: Any, feature: Any) -> Any:
        if isinstance(feature, ClassLabel):
            return None if value is None or value < 0 else feature.names[value]
        if isinstance(feature, List) and isinstance(feature.feature, ClassLabel) and value is not None:
            return [name(item, feature.feature) for item in value]
        return value

    return {column: name(value, features.get(column)) for column, value in row.items()}


class Reader:
    """Reads rows with the columns that a task needs.

    Args:
        columns: Names that the task gives them, and those that they have in the data.
        check: Returns a row as the task needs it, and raises `ValueError` with the end of the sentence "1 of 3
            documents ..." if the row is bad.
        config: Configuration of a dataset on the Hub.
    """

    def __init__(
        self, columns: Mapping[str, str], check: Callable[[Row], Row] = lambda row: row, config: str | None = None
    ) -> None:
        self.columns = dict(columns)
        self.check = check
        self.config = config

    def read(self, source: str | Path, split: str = "train") -> Dataset:
        """All rows of a source: `name` (the row number, or the file within `source`) and the columns.

        Raises:
            InputError: `source` cannot be read, is empty, lacks a column or mixes types in one, or has a bad row.
        """
        if _is_local(source):
            rows, features = list(iter_rows(Path(source))), {}
        else:
            dataset = _hub(str(source), self.config, split, streaming=False)
            rows, features = list(dataset), dataset.features
        if not rows:
            raise InputError(f"{source} holds no documents.")
        return Dataset.from_list(self.checked(rows, source, features))

    def stream(self, source: str | Path, split: str = "train") -> IterableDataset:
        """The rows of a source as they are, read when they are needed; `checked` makes them what `read` returns."""
        if _is_local(source):
            return IterableDataset.from_generator(iter_rows, gen_kwargs={"path": Path(source)})
        return _hub(str(source), self.config, split, streaming=True)

    def checked(
        self, rows: Sequence[Row], source: str | Path, features: Mapping[str, Any] | None = None, first: int = 0
    ) -> list[Row]:
        """Rows with the names of the task, checked.

        Args:
            rows: Rows of `source`, the first of which has the number `first`.
            source: Where they come from.
            features: Of a dataset on the Hub, which numbers its labels.
            first: Number of the first row.

        Raises:
            InputError: A column is missing or mixes types, or a row is bad.
        """
        is_folder = Path(source).is_dir() or Path(source).suffix.lower() == ".zip"
        columns = {name: name if is_folder else actual for name, actual in self.columns.items()}
        found = dict.fromkeys(column for row in rows for column in row)
        missing = sorted(set(columns.values()) - found.keys())
        if missing:
            raise InputError(f"{source} has no column {', '.join(missing)}; it has {', '.join(found)}.")
        names = [row["name"] if is_folder else str(number) for number, row in enumerate(rows, first)]
        rows = [_named_labels(row, features or {}) for row in rows]
        for actual in columns.values():
            values = [row.get(actual) for row in rows]
            _check_types(source, actual, names, values)
            _check_characters(source, actual, names, values)
        good, bad = [], []
        for name, row in zip(names, rows, strict=True):
            try:
                good.append(self.check({"name": name, **{new: row.get(old) for new, old in columns.items()}}))
            except ValueError as error:
                bad.append((str(error), name))
        if bad:
            problem, name = bad[0]
            count = sum(other == problem for other, _ in bad)
            raise InputError(f"{source}: {count} of {len(rows)} documents {problem}, first {name!r}.")
        return good


def _is_local(source: str | Path) -> bool:
    path = Path(source)
    return path.exists() or path.suffix.lower() in (".zip", *TABLES)


def _check_types(source: str | Path, column: str, names: Sequence[str], values: Sequence[Any]) -> None:
    first: dict[str, str] = {}
    for name, value in zip(names, values, strict=True):
        items = value if isinstance(value, list) else [value]
        for item in items:
            if item is not None:
                kind = _kind(item)
                first.setdefault(f"lists of {kind}" if isinstance(value, list) else kind, name)
    if len(first) > 1:
        found = " and ".join(f"{kind} (first in {name!r})" for kind, name in first.items())
        raise InputError(f"{source}: the column {column} mixes {found}; all its values must be of one type.")


def _check_characters(source: str | Path, column: str, names: Sequence[str], values: Sequence[Any]) -> None:
    """No tokenizer takes half a character, which JSON allows."""
    bad = [name for name, value in zip(names, values, strict=True) if _has_surrogate(value)]
    if bad:
        raise InputError(
            f"{source}: {len(bad)} of {len(names)} documents have half a character (a lone surrogate) in their column "
            f"{column}, first {bad[0]!r}."
        )


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return re.search("[\ud800-\udfff]", value) is not None
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and any(map(_has_surrogate, value))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "number"
    return {str: "text", list: "list", dict: "object"}.get(type(value), type(value).__name__)


# Parts


def stratified_order(labels: Sequence[str], seed: int) -> np.ndarray:
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


def split_rows(
    args: argparse.Namespace, reader: Reader, stratum: Callable[[Row], str] = lambda row: ""
) -> dict[str, Dataset]:
    """The training, validation and test rows that the options ask for.

    Args:
        args: The options of `add_data_arguments`.
        reader: Reads them.
        stratum: Parts and subsets are stratified by this.

    Returns:
        `train`, but under `--streaming`; `validation`; `test`, unless `--test-fraction` is 0, or it is missing beside a
        stream.

    Raises:
        InputError: A part has no documents, or options do not fit together.
    """

    def order(rows: Dataset) -> np.ndarray:
        return stratified_order([stratum(row) for row in rows], args.seed)

    if args.streaming and args.max_train_documents is not None:
        raise InputError("--max-train-documents cannot choose from a stream; --max-steps bounds what is read of it.")
    if args.dataset_config and _is_local(args.dataset):
        raise InputError(f"--dataset-config needs a dataset on the Hub; {args.dataset} is none.")
    if args.train_split != TRAIN_SPLIT and _is_local(args.dataset):
        raise InputError(f"--train-split needs a dataset on the Hub; {args.dataset} is none.")
    for part in PARTS[1:]:
        if args.streaming and getattr(args, f"{part}_fraction") is not None:
            raise InputError(f"--{part}-fraction cannot be taken from a stream: give --{part}-file or a split.")
    parts, folds = {}, {}
    rest = None if args.streaming else reader.read(args.dataset, args.train_split)
    for part in PARTS[1:]:
        file, split, fold = (getattr(args, f"{part}_{kind}") for kind in ("file", "split", "fold"))
        if split and Path(args.dataset).exists():
            raise InputError(f"--{part}-split needs a dataset on the Hub; for {args.dataset} use --{part}-file.")
        if file or split:
            parts[part] = reader.read(file) if file else reader.read(args.dataset, split)
        elif fold is not None:
            folds[part] = fold
    if rest is None:
        if folds or "validation" not in parts:
            raise InputError("--streaming cannot split what it has not read: give --validation-file or a split.")
    else:
        if bool(folds) != bool(args.fold_regex):
            raise InputError("--fold-regex needs --validation-fold or --test-fold, and the other way round.")
        if len(set(folds.values())) < len(folds):
            raise InputError(f"--validation-fold and --test-fold are both {folds['test']}.")
        if folds:
            found = [re.search(args.fold_regex, name) for name in rest["name"]]
            if None in found:
                name = rest["name"][found.index(None)]
                raise InputError(f"--fold-regex {args.fold_regex} is not in the name {name!r}.")
            fold_of = np.array([match.group(1) for match in found])
            parts |= {part: rest.select(np.flatnonzero(fold_of == fold)) for part, fold in folds.items()}
            rest = rest.select(np.flatnonzero(~np.isin(fold_of, list(folds.values()))))
        left, total = order(rest), len(rest)
        for part in PARTS[1:]:
            share = getattr(args, f"{part}_fraction")
            share = FRACTION if share is None else share
            if part not in parts and (share or part == "validation"):
                count = round(share * total)
                parts[part] = rest.select(np.sort(left[:count]))
                left = left[count:]
        parts["train"] = rest.select(np.sort(left))
    for part, rows in parts.items():
        most = getattr(args, f"max_{part}_documents")
        if most is not None:
            parts[part] = rows.select(np.sort(order(rows)[:most]))
        if not len(rows):
            raise InputError(f"There are no {part} documents.")
    return {part: parts[part] for part in PARTS if part in parts}
