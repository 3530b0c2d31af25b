"""Data of Long Range Arena: the tasks, their files, and the form in which `lra.py prepare` keeps them.

Prepared data is a folder with a `DatasetDict` on disk (`train`, `validation`, `test`; columns `input_ids`, for two
texts `input_ids_2`, and `labels`) and `prepared.json`, which says where it comes from. Id 0 is padding; byte or grey
level `b` is `b + 1`.
"""

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import PARTS, InputError, Reader, Row, stratified_order
from _finetuning import check_text
from _lra_listops import VOCABULARY, generate, parse
from _lra_pathfinder import draw_picture
from _record import write_json
from datasets import Dataset, DatasetDict, Features, Sequence, Value, concatenate_datasets, load_dataset
from torch import Tensor
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Task:
    """A task, and the paper's training of it, as far as its public code says it.

    Attributes:
        name: As on the command line.
        labels: How many.
        vocabulary: Ids, padding included.
        max_length: Longest sequence in tokens; longer ones are truncated.
        texts: Sequences per example.
        batch_size: Examples per step.
        learning_rate: Peak.
        warmup: Steps of linear warmup, before linear decay to 0.
        steps: At most.
        eval_every: Steps between evaluations.
    """

    name: str
    labels: int
    vocabulary: int
    max_length: int
    texts: int
    batch_size: int
    learning_rate: float
    warmup: int
    steps: int
    eval_every: int


TASKS = {
    task.name: task
    for task in (
        Task("text", 2, 257, 4000, 1, 128, 1e-4, 80, 50_000, 500),
        Task("listops", 10, len(VOCABULARY) + 1, 2000, 1, 256, 1e-4, 1000, 20_000, 500),
        Task("retrieval", 2, 257, 4000, 2, 64, 1e-4, 800, 60_000, 300),
        Task("pathfinder", 2, 257, 1024, 1, 512, 2e-4, 312, 31_200, 312),
        Task("image", 10, 257, 1024, 1, 256, 1e-4, 175, 50_000, 50),
    )
}
PATIENCE = 10  # evaluations without a lower validation loss


# Sources: each gives the rows of every part


def from_listops(
    source: Path | None, counts: Mapping[str, int], seed: int, balanced: bool, **limits: int
) -> dict[str, Iterable[Row]]:
    """ListOps: generated, or the files `basic_train.tsv`, `basic_val.tsv`, `basic_test.tsv` of the release.

    Args:
        source: The folder of the release; `None` generates.
        counts: Examples of each part to generate.
        seed: Of the generator.
        balanced: As many examples of every label.
        **limits: As in `_lra_listops.generate`.
    """
    if source is not None:
        names = {part: "val" if part == "validation" else part for part in PARTS}
        return {part: _listops_file(source / f"basic_{names[part]}.tsv") for part in PARTS}
    total = sum(counts.values())
    expressions = tqdm(generate(total, seed, balanced=balanced, **limits), total=total, unit="expr", desc="ListOps")
    rows = [{"input_ids": [VOCABULARY[token] for token in tokens], "labels": value} for tokens, value in expressions]
    if balanced:  # the last ones are those whose value is rare
        rows = [rows[i] for i in stratified_order([row["labels"] for row in rows], seed)]
    stream = iter(rows)
    return {part: list(islice(stream, counts[part])) for part in PARTS}


def _listops_file(path: Path) -> Iterator[Row]:
    header, *lines = _read(path).decode("utf-8", "replace").splitlines() or [""]
    if header != "Source\tTarget":
        raise InputError(f"{path} begins with {header[:60]!r}; expected is the line Source, tab, Target.")
    for number, line in enumerate(lines, start=2):
        source, _, value = line.rpartition("\t")
        try:
            tokens = parse(source)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        if value not in map(str, range(10)):
            raise InputError(f"{path}, line {number}, ends in {value[:20]!r}; expected is a digit, the value.")
        yield {"input_ids": [VOCABULARY[token] for token in tokens], "labels": int(value)}


def from_text(source: str, counts: Mapping[str, int | None], seed: int) -> dict[str, Iterable[Row]]:
    """Reviews, byte by byte: a data set of the Hub (`stanfordnlp/imdb`), or a folder or zip file.

    A folder with `train` and `test` inside (IMDb as its authors distribute it) or the Hub says which are for
    testing; a tenth of the others is for validation. Else a tenth is for each, drawn with `seed` by label.

    Args:
        source: Name or path; files lie in folders `neg` and `pos`, others (`unsup`) are ignored.
        counts: At most so many reviews of each part, as many of either label; `None`: all.
        seed: Of the draw.
    """
    read = Reader({"text": "text", "label": "label"}, lambda row: check_text(row, "text")).read
    path = Path(source)
    if path.is_dir() and (path / "train").is_dir() and (path / "test").is_dir():
        train, test = read(path / "train"), read(path / "test")
    elif path.exists():
        train, test = read(path), None
    else:
        train, test = read(source, "train"), read(source, "test")
    parts = {"train": _labelled(train), "test": [] if test is None else _labelled(test)}
    rows = parts["train"]
    rows = [rows[i] for i in stratified_order([row["labels"] for row in rows], seed)]
    held_out = PARTS[1:] if test is None else PARTS[1:2]
    tenth = len(rows) // 10
    for part in held_out:
        parts[part], rows = rows[:tenth], rows[tenth:]
    return {part: _at_most(counts[part], chosen, seed) for part, chosen in (parts | {"train": rows}).items()}


def _at_most(count: int | None, rows: list[Row], seed: int) -> list[Row]:
    return rows if count is None else [rows[i] for i in stratified_order([r["labels"] for r in rows], seed)[:count]]


def _labelled(documents: Dataset) -> list[Row]:
    label = {"neg": 0, "pos": 1, "0": 0, "1": 1}
    rows = [
        {"input_ids": byte_ids(text.encode("utf-8")), "labels": label[str(name)]}
        for text, name in zip(documents["text"], documents["label"], strict=True)
        if str(name) in label
    ]
    if not rows:
        raise InputError(f"The labels are {sorted(set(map(str, documents['label'])))}; expected are neg and pos.")
    return rows


def from_retrieval(source: Path) -> dict[str, Iterable[Row]]:
    """Pairs of papers, byte by byte: `new_aan_pairs.{train,eval,test}.tsv` of the release.

    Args:
        source: Their folder. A line is `label`, two ids, two texts, between tabs; label 1: one paper cites the other.
    """
    names = {part: "eval" if part == "validation" else part for part in PARTS}
    return {part: _retrieval_file(source / f"new_aan_pairs.{names[part]}.tsv") for part in PARTS}


def _retrieval_file(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        fields = line.rstrip(b"\n").split(b"\t")
        if len(fields) != 5 or fields[0] not in (b"0", b"0.0", b"1", b"1.0"):
            raise InputError(
                f"{path}, line {number}, has {len(fields)} fields and begins {line[:40]!r}; expected are five between "
                "tabs: the label 0 or 1, two ids, two texts."
            )
        yield {
            "input_ids": byte_ids(fields[3]),
            "input_ids_2": byte_ids(fields[4]),
            "labels": int(float(fields[0])),
        }


def from_pathfinder(source: Path | None, counts: Mapping[str, int], seed: int) -> dict[str, Iterable[Row]]:
    """Pathfinder: pictures of ours, or a folder such as `pathfinder32/curv_contour_length_14` of the release.

    The release has no parts: as in Long Range Arena a tenth is for validation and a tenth for the test,
    here drawn with `seed`.

    Args:
        source: With `metadata/*.npy` (text, despite their name) and the PNG files they list; `None` generates.
        counts: Examples of each part to generate, as many of either label.
        seed: Of the generator, or of the draw.
    """
    if source is None:
        draws = np.random.default_rng(seed).spawn(len(PARTS))
        return {part: _drawn(counts[part], draw) for part, draw in zip(PARTS, draws, strict=True)}
    listed = [entry for path in sorted((source / "metadata").glob("*.npy")) for entry in _metadata(path)]
    if not listed:
        raise InputError(f"{source} has no metadata/*.npy that lists pictures.")
    order = np.random.default_rng(seed).permutation(len(listed))
    tenth = len(listed) // 10
    slices = {"validation": order[:tenth], "test": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    return {part: _pictures(source, [listed[i] for i in indices]) for part, indices in slices.items()}


def _drawn(count: int, draw: np.random.Generator) -> Iterator[Row]:
    for label in draw.permutation(np.arange(count) % 2):
        yield {"input_ids": level_ids(draw_picture(draw, int(label)).pixels), "labels": int(label)}


def _metadata(path: Path) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(_read(path).decode("utf-8", "replace").splitlines(), start=1):
        fields = line.split(" ")
        if len(fields) < 4 or fields[3] not in ("0", "1") or ".." in f"{fields[0]}/{fields[1]}".split("/"):
            raise InputError(f"{path}, line {number}, is {line[:60]!r}; expected: folder, file, number, label 0 or 1.")
        yield f"{fields[0]}/{fields[1]}", int(fields[3])


def _pictures(source: Path, listed: list[tuple[str, int]]) -> Iterator[Row]:
    from PIL import Image, UnidentifiedImageError  # comes with hf-skein[plot]; the other tasks do without

    for name, label in listed:
        content = _read(source / name)
        if not content:  # the release has some empty files, which Long Range Arena leaves out
            continue
        try:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                pixels = np.asarray(image.convert("L"))
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{source / name} is no PNG file: {error}") from error
        if pixels.shape != (32, 32):
            raise InputError(f"{source / name} has {pixels.shape[1]} x {pixels.shape[0]} pixels; expected are 32 x 32.")
        yield {"input_ids": level_ids(pixels), "labels": label}


def from_image(source: str) -> dict[str, Iterable[Row]]:
    """CIFAR-10 in grey levels: the folder of its binary version, or a data set of the Hub (`uoft-cs/cifar10`).

    As in Long Range Arena the last tenth of the training pictures is for validation.

    Args:
        source: A folder with `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`, or the name.
    """
    folder = Path(source)
    if not folder.exists():
        train, test = ([_cifar_row(row) for row in _hub(source, split)] for split in ("train", "test"))
    elif (folder / "data_batch_1").exists():
        raise InputError(
            f"{source} is the Python version of CIFAR-10, whose pickles can run any code when read. Download the "
            "binary version (cifar-10-binary.tar.gz)."
        )
    else:
        train = [row for i in range(1, 6) for row in _cifar_file(folder / f"data_batch_{i}.bin")]
        test = _cifar_file(folder / "test_batch.bin")
    tenth = len(train) // 10
    return {"train": train[: len(train) - tenth], "validation": train[len(train) - tenth :], "test": test}


def _cifar_file(path: Path) -> list[Row]:
    content = np.frombuffer(_read(path), np.uint8)
    if not len(content) or len(content) % 3073:
        raise InputError(f"{path} has {len(content)} bytes; expected are records of 3073: label, 3 x 1024 levels.")
    records = content.reshape(-1, 3073)
    return [{"input_ids": level_ids(grey(r[1:].reshape(3, 32, 32))), "labels": int(r[0])} for r in records]


def _hub(name: str, split: str) -> Dataset:
    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError) as error:  # OSError: also no connection
        raise InputError(f"{name} is no folder, and no data set that loads from the Hub: {error}") from error


def _cifar_row(row: Row) -> Row:
    pixels = np.asarray(row["img"].convert("RGB")).transpose(2, 0, 1)
    return {"input_ids": level_ids(grey(pixels)), "labels": row["label"]}


def grey(pixels: np.ndarray) -> np.ndarray:
    """Red, green and blue `[3, ...]` uint8 as luma by ITU-R BT.601.

    As Long Range Arena has it, by TensorFlow: weights that add up to 0.9999, and levels up to 255.5, rounded down.
    """
    weights = np.array([0.2989, 0.5870, 0.1140], np.float32)
    return (np.tensordot(weights, pixels / np.float32(255), 1) * np.float32(255.5)).astype(np.uint8)


def level_ids(pixels: np.ndarray) -> np.ndarray:
    """Grey levels of any shape, uint8, as ids, row by row: the level plus 1."""
    return pixels.reshape(-1).astype(np.uint16) + 1


def byte_ids(content: bytes) -> np.ndarray:
    """Bytes as ids: the byte plus 1."""
    return level_ids(np.frombuffer(content, np.uint8))


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a file too large to be read at once."""
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


# Prepared data


def write_prepared(task: Task, parts: Mapping[str, Iterable[Row]], output: Path, about: Mapping[str, Any]) -> Row:
    """Writes prepared data, complete or not at all.

    Args:
        task: Longer sequences are truncated to its `max_length`.
        parts: The rows of train, validation and test.
        output: A folder that does not exist.
        about: Where the data comes from; part of `prepared.json`.

    Returns:
        What `prepared.json` holds.

    Raises:
        InputError: `output` exists, a part is empty, a row is empty, or a label is out of range.
    """
    if output.exists():
        raise InputError(f"{output} exists; delete it or name another --output.")
    columns = ["input_ids", "input_ids_2"][: task.texts]
    features = Features({name: Sequence(Value("uint16")) for name in columns} | {"labels": Value("int64")})
    datasets, statistics = {}, {}
    for part in PARTS:
        digest, counts, lengths, chunks = hashlib.sha256(), Counter(), [], []
        rows = iter(tqdm(parts[part], unit="row", desc=part))
        while chunk := list(islice(rows, 1000)):
            for row in chunk:
                _check(row, columns, task, part)
                counts[row["labels"]] += 1
                lengths.append([len(row[name]) for name in columns])
                for name in columns:
                    row[name] = np.asarray(row[name], np.uint16)[: task.max_length]
                    digest.update(len(row[name]).to_bytes(4, "little") + row[name].tobytes())
                digest.update(bytes([row["labels"]]))
            chunks.append(Dataset.from_list(chunk, features=features))
        if not chunks:
            raise InputError(f"There are no {part} examples.")
        datasets[part] = concatenate_datasets(chunks)
        statistics[part] = {
            "examples": len(lengths),
            "label_shares": [counts[label] / len(lengths) for label in range(task.labels)],
            "mean_length": float(np.mean(lengths)),
            "longest": int(np.max(lengths)),
            "truncated": int((np.array(lengths) > task.max_length).any(-1).sum()),
            "sha256": digest.hexdigest(),
        }
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    DatasetDict(datasets).save_to_disk(str(partial))
    prepared = {"task": task.name, **about, "parts": statistics}
    write_json(partial / "prepared.json", prepared)
    partial.rename(output)
    return prepared


def _check(row: Row, columns: list[str], task: Task, part: str) -> None:
    if any(len(row[name]) == 0 for name in columns):
        raise InputError(f"A {part} example is empty.")
    if not 0 <= row["labels"] < task.labels:
        raise InputError(f"A {part} example has the label {row['labels']}; expected are 0 to {task.labels - 1}.")


def read_prepared(folder: Path) -> tuple[Task, DatasetDict, Row]:
    """The task, the parts and `prepared.json` of a folder that `lra.py prepare` wrote.

    Raises:
        InputError: It is none.
    """
    path = folder / "prepared.json"
    if not path.exists():
        raise InputError(f"{folder} holds no prepared data; make it with `lra.py prepare`.")
    prepared = json.loads(path.read_text(encoding="utf-8"))
    return TASKS[prepared["task"]], DatasetDict.load_from_disk(str(folder)).with_format("numpy"), prepared


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """A batch: ids `[batch, longest]` padded with 0, and labels `[batch]`."""
    batch = {}
    for name in rows[0]:
        values = [torch.from_numpy(np.asarray(row[name], np.int64)) for row in rows]
        is_sequence = name.startswith("input_ids")
        batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True) if is_sequence else torch.stack(values)
    return batch
