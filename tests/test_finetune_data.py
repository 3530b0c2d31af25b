"""scripts/_data.py and the documents of a step: every format, splits, streams, what is refused."""

import copy
import random
import zipfile
from pathlib import Path

import _data
import pandas as pd
import pytest
from _data import InputError, Reader, add_data_arguments, split_rows, stratified_order
from _training import StreamSteps, TableSteps, length_grouped_steps, own_batches
from datasets import ClassLabel, Dataset, IterableDataset, List
from tiny_encoder import make_documents, write_jsonl


COLUMNS = {"text": "text", "label": "label"}


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
    ("2020-01-01 " + "long " * 40_000, "null"),
    ("naïve\u2028 text", "null"),
]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "zip", "folders"])
def test_every_format_gives_the_same_documents(tmp_path, capsys, kind):
    if kind in ("zip", "folders"):
        path = (write_zip if kind == "zip" else write_folders)(tmp_path, TRICKY)
    else:
        path = write_table(tmp_path, kind, TRICKY)
    reader = Reader(COLUMNS)
    rows = reader.read(path)
    assert list(zip(rows["text"], rows["label"], strict=True)) == TRICKY
    assert reader.checked(list(reader.stream(path)), path) == list(rows)
    if kind == "zip":
        assert "3 of 7 files are no labelled .txt documents" in capsys.readouterr().out
        assert rows["name"][0] == "top/007/cv000.txt"


def test_columns_have_any_name(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "a", "y": 1, "text": "other"}])
    assert Reader({"text": "body", "label": "y"}).read(path)[0] == {"name": "0", "text": "a", "label": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset_has_names_for_its_labels(monkeypatch, streaming):
    rows = Dataset.from_dict({"sentence": ["a", "b"], "y": [1, 0], "tags": [[0, 1], [1]]})
    names = ClassLabel(names=["no", "yes"])
    rows = rows.cast_column("y", names).cast_column("tags", List(names))
    hub = rows.to_iterable_dataset() if streaming else rows
    monkeypatch.setattr(_data, "load_dataset", lambda name, config, split, streaming: hub)
    reader = Reader({"text": "sentence", "label": "y", "tags": "tags"})
    if streaming:
        stream = reader.stream("some/dataset")
        found = reader.checked(list(stream), "some/dataset", stream.features)
    else:
        found = list(reader.read("some/dataset"))
    assert [(row["label"], row["tags"]) for row in found] == [("yes", ["no", "yes"]), ("no", ["yes"])]


# Parts


def test_stratified_order():
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 9 + ["d"]
    order = stratified_order(labels, seed=3)
    assert sorted(order) == list(range(100))
    beginning = [labels[i] for i in order[:20]]
    assert [beginning.count(label) for label in "abcd"] == [12, 6, 2, 0]
    assert (order == stratified_order(labels, seed=3)).all()
    assert (order != stratified_order(labels, seed=4)).any()


def split(*more: object) -> dict[str, Dataset]:
    parser = _data.argparse.ArgumentParser()
    add_data_arguments(parser, COLUMNS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args([str(item) for item in more])
    return split_rows(args, Reader(COLUMNS), lambda row: row["label"])


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    return write_jsonl(path, [{"text": text, "label": label} for text, label in make_documents(80)])


def test_splits_are_disjoint_and_seeded(reviews):
    parts = split("--dataset", reviews)
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 64, "validation": 8, "test": 8}
    assert len({name for rows in parts.values() for name in rows["name"]}) == 80
    assert list(parts["test"]["label"]).count("pos") == 4
    assert list(split("--dataset", reviews)["test"]["name"]) == list(parts["test"]["name"])
    assert list(split("--dataset", reviews, "--seed", 1)["test"]["name"]) != list(parts["test"]["name"])
    assert split("--dataset", reviews, "--test-fraction", 0).keys() == {"train", "validation"}


def test_folds_files_and_subsets(tmp_path, reviews):
    path = write_zip(tmp_path, make_documents(60))
    folds = ("--dataset", path, "--fold-regex", r"cv0(\d)", "--test-fold", 5)
    parts = split(*folds, "--validation-fold", 4, "--max-train-documents", 10)
    assert all("/cv05" in name for name in parts["test"]["name"]) and len(parts["test"]) == 10
    assert all("/cv04" in name for name in parts["validation"]["name"]) and len(parts["validation"]) == 10
    assert len(parts["train"]) == 10 and list(parts["train"]["label"]).count("pos") == 5
    assert {len(rows) for rows in split(*folds, "--validation-file", reviews).values()} == {50, 80, 10}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fold-regex", r"(\d)"], "needs --validation-fold"),
        (["--test-fold", "1"], "needs --validation-fold"),
        (["--fold-regex", r"(\d)", "--test-fold", "1", "--validation-fold", "1"], "are both 1"),
        (["--fold-regex", r"x(\d)", "--test-fold", "1"], "not in the name '0'"),
        (["--test-split", "test"], "use --test-file"),
        (["--streaming"], "give --validation-file"),
        (["--validation-fraction", "0"], "no validation documents"),
        (["--streaming", "--max-train-documents", "3"], "--max-train-documents cannot choose from a stream"),
        (["--dataset-config", "en"], "--dataset-config needs a dataset on the Hub"),
        (["--train-split", "dev"], "--train-split needs a dataset on the Hub"),
        (["--streaming", "--test-fraction", "0.1"], "--test-fraction cannot be taken from a stream"),
    ],
)
def test_bad_split(reviews, more, message):
    with pytest.raises(InputError, match=message):
        split("--dataset", reviews, *more)


# Refusals


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no file"),
        ("latin.csv", "text,label\ncafé,x\n".encode("latin-1"), "not UTF-8"),
        ("latin.jsonl", '{"text": "café", "label": "x"}\n'.encode("latin-1"), "not UTF-8"),
        ("broken.jsonl", b'{"text": "a", "label": "b"}\n{"text": \n', "cannot be read: line 2 is no JSON"),
        ("number.jsonl", b"3\n", "line 1 is not an object"),
        ("broken.parquet", b"PAR1", "cannot be read"),
        ("broken.zip", b"PK", "cannot be read"),
        ("broken.csv", b'text,label\na,b\n"c,d\n', "cannot be read"),
        ("ragged.csv", b"text,label\na,b\nc\n", "line 3 has not the 2 fields"),
        ("empty.csv", b"", "cannot be read: it is empty"),
        ("head.csv", b"text,label\n", "holds no documents"),
        ("object.json", b'{"text": "a"}', "not a list of objects"),
        ("column.jsonl", b'{"text": "a"}\n', "has no column label; it has text"),
        (
            "mixed.jsonl",
            b'{"text": "a", "label": 1}\n{"text": 2, "label": 1}\n',
            "column text mixes text .* and number",
        ),
        ("lists.json", b'[{"text": "a", "label": ["b", 1]}]', "mixes lists of text .* and lists of number"),
    ],
)
def test_unreadable_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        Reader(COLUMNS).read(tmp_path / name)


def test_unreadable_text_file(tmp_path):
    write_folders(tmp_path, make_documents(4))
    (tmp_path / "top" / "pos" / "cv009.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"top/pos/cv009\.txt .* is not UTF-8"):
        Reader(COLUMNS).read(tmp_path)


def test_encrypted_zip_file(tmp_path):
    path = tmp_path / "reviews.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pos/cv000.txt", "great")
    content = bytearray(path.read_bytes())
    content[6] |= 1  # the flag of the file's own header
    content[content.index(b"PK\x01\x02") + 8] |= 1  # and of the one at the end
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"pos/cv000\.txt in .* cannot be read \(.*encrypted.*\); unpack it"):
        Reader(COLUMNS).read(path)


def test_half_a_character(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a \\ud800 b", "label": "x"}\n')
    with pytest.raises(InputError, match=r"1 of 1 documents have half a character .* in their column text, first '0'"):
        Reader(COLUMNS).read(path)
    path.write_text('{"text": ["a"], "label": {"x": ["\\udfff"]}}\n')
    with pytest.raises(InputError, match="in their column label"):
        Reader(COLUMNS).read(path)


def test_hub_dataset_that_is_a_script(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(_data, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"no dataset that loads from the Hub: Dataset scripts are no longer"):
        Reader(COLUMNS).read("some/dataset")


# The documents of a step


def test_steps_group_by_length_and_hold_every_document_once():
    lengths = [random.Random(i).randint(1, 500) for i in range(203)]
    steps = length_grouped_steps(lengths, 8, seed=1, epoch=0)
    assert steps == length_grouped_steps(lengths, 8, seed=1, epoch=0)
    assert sorted(i for step in steps for i in step) == list(range(203))
    assert [len(step) for step in steps] == [8] * 25 + [3]
    spread = [max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in steps]
    assert sorted(spread)[13] < 100  # of 500 if the documents were random
    assert steps != length_grouped_steps(lengths, 8, seed=1, epoch=1)
    assert steps != length_grouped_steps(lengths, 8, seed=2, epoch=0)


@pytest.mark.parametrize("count", [1, 2, 7, 12])
@pytest.mark.parametrize(("batch_size", "processes"), [(12, 1), (2, 3), (4, 2)])
def test_processes_share_the_documents_of_a_step(count, batch_size, processes):
    rows = [{"i": i} for i in range(count)]
    shares = [own_batches(rows, batch_size, processes, rank) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert all(1 <= len(batch) <= batch_size for share in shares for batch, _ in share)
    counted = [row["i"] for share in shares for batch, counts in share if counts for row in batch]
    assert sorted(counted) == list(range(count))


def rows_of_length(numbers: list[int]) -> list[dict]:
    return [{"input_ids": [0] * (1 + i % 7), "i": i} for i in numbers]


def generate(count: int):
    yield from ({"i": i} for i in range(count))


def steps_of(kind: str, count: int) -> TableSteps | StreamSteps:
    if kind == "table":
        return TableSteps(Dataset.from_list(rows_of_length(list(range(count)))), 4, seed=5)

    def prepare(raw: list[dict], first: int) -> list[dict]:
        assert [row["i"] for row in raw] == list(range(first, first + len(raw)))
        return rows_of_length([row["i"] for row in raw])

    stream = IterableDataset.from_generator(generate, gen_kwargs={"count": count})
    return StreamSteps(stream, prepare, lambda rows: {"documents": len(rows)}, 4, seed=5, buffer=3)


def test_every_piece_of_a_streamed_row_is_used():
    """Each of 5 rows becomes 8 pieces."""
    stream = IterableDataset.from_generator(generate, gen_kwargs={"count": 5})
    read = []

    def prepare(raw: list[dict], first: int) -> list[dict]:
        pieces = [8 * row["i"] + k for row in raw for k in range(8)]
        read.extend(pieces)
        return rows_of_length(pieces)

    steps = StreamSteps(stream, prepare, lambda rows: {"documents": len(rows)}, 4, seed=5, buffer=3)
    seen = [row["i"] for _ in range(18) for row in next(steps)]  # of buffers with 4 and, over the end, 5 rows
    assert sorted(seen) == sorted([*range(40), *range(32)]) == sorted(read)


@pytest.mark.parametrize("kind", ["table", "stream"])
@pytest.mark.parametrize("done", [0, 2, 3, 5, 6, 7, 11])
def test_steps_go_on_where_they_were(kind, done):
    """Also in the middle of a buffer, at its end, and after the end of the data, which is 17 or 24 documents long."""
    for count in (17, 24):
        steps = steps_of(kind, count)
        for _ in range(done):
            next(steps)
        state = copy.deepcopy(steps.state_dict())
        expected = [[row["i"] for row in next(steps)] for _ in range(12)]
        again = steps_of(kind, count)
        again.load_state_dict(state)
        assert [[row["i"] for row in next(again)] for _ in range(12)] == expected
        assert again.epoch == steps.epoch


def test_a_stream_is_read_in_its_order_and_shuffled_within_a_buffer():
    steps = steps_of("stream", 24)
    first = [row["i"] for _ in range(3) for row in next(steps)]
    second = [row["i"] for _ in range(3) for row in next(steps)]
    assert sorted(first) == list(range(12)) != first and sorted(second) == list(range(12, 24))
    third = [row["i"] for _ in range(3) for row in next(steps)]
    assert sorted(third) == sorted(first) and third != first  # the second pass has another order


def test_an_empty_stream_is_refused():
    with pytest.raises(InputError, match="stream of training documents is empty"):
        next(steps_of("stream", 0))
