"""The data of scripts/lra.py: generators against independent checks, and small files in the real formats."""

import io
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import lra
from _data import PARTS, InputError
from _lra_data import TASKS, grey, read_prepared, write_prepared
from _lra_listops import TOKENS, generate, parse, random_expression
from _lra_pathfinder import CLEARANCE, GAP, draw_picture


def prepare(output: Path, *arguments: str) -> tuple:
    lra.main(["prepare", *map(str, arguments), "--output", str(output)])
    return read_prepared(output)


# ListOps


def reduce(tokens: list[str]) -> int:
    """The value of an expression by rewriting innermost operators, one after another; no recursion, as text."""
    text = " ".join(tokens)
    innermost = re.compile(r"\[(MAX|MIN|MED|SM) ([\d ]+) \]")
    while match := innermost.search(text):
        digits = np.array(match[2].split(), int)
        value = {"MAX": digits.max, "MIN": digits.min, "MED": lambda d=digits: np.median(d), "SM": digits.sum}[
            match[1]
        ]()
        text = text.replace(match[0], str(int(value) % 10))
    return int(text)


def depth_and_arguments(tokens: list[str]) -> tuple[int, list[int]]:
    """The greatest depth (the root has 1), and the number of arguments of every operator."""
    counts, stack, deepest = [], [0], 1
    for token in tokens:
        if token == "]":
            counts.append(stack.pop())
            continue
        stack[-1] += 1
        deepest = max(deepest, len(stack))
        if token.startswith("["):
            stack.append(0)
    assert stack == [1]
    return deepest, counts


def test_expressions_follow_the_specification():
    seen, depths, arguments = set(), [], Counter()
    operators: Counter = Counter()
    for tokens, value in generate(60, seed=1):
        assert 500 < len(tokens) < 2000 and set(tokens) <= set(TOKENS)
        assert reduce(tokens) == value
        deepest, counts = depth_and_arguments(tokens)
        assert deepest <= 10 and min(counts) >= 2 and max(counts) <= 10
        depths.append(deepest)
        arguments.update(counts)
        operators.update(token for token in tokens if token.startswith("["))
        seen.add(" ".join(tokens))
    assert len(seen) == 60
    shares = np.array([operators[name] for name in ("[MAX", "[MIN", "[MED", "[SM")]) / operators.total()
    np.testing.assert_allclose(shares, 0.25, atol=0.03)
    assert max(depths) == 10 and set(arguments) == set(range(2, 11))


def test_a_node_is_an_operator_with_probability_one_quarter():
    draw = np.random.default_rng(0)
    found = [random_expression(draw) for _ in range(2000)]  # short ones too; None is one that grew too long
    is_operator = [expression is None or expression[0][0].startswith("[") for expression in found]
    assert abs(np.mean(is_operator) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)


def test_a_seed_gives_the_same_expressions_again():
    assert list(generate(5, seed=2)) == list(generate(5, seed=2))
    assert list(generate(5, seed=2)) != list(generate(5, seed=3))


def test_values_can_be_balanced():
    counts = Counter(value for _, value in generate(43, seed=0, balanced=True, min_length=20))
    assert sorted(counts) == list(range(10)) and sorted(counts.values()) == [4] * 7 + [5] * 3


@pytest.mark.parametrize(
    ("source", "value"),
    [("[MED 1 2 ]", 1), ("[MED 9 1 4 ]", 4), ("[SM 9 9 ]", 8), ("[MAX 2 [MIN 7 3 ] ]", 3), ("[MIN 0 5 ]", 0)],
)
def test_the_checker_itself(source, value):
    assert reduce(parse(source)) == value


def test_listops_of_the_release_is_read(tmp_path):
    release = tmp_path / "listops"
    release.mkdir()
    # Long Range Arena writes binary trees in round brackets, and ends lines as csv does.
    lines = ["( ( ( [MAX 3 ) ( ( ( [SM 4 ) 8 ) ] ) ) ] )\t3", "( ( ( [MED 1 ) 2 ) ] )\t1"]
    for part in ("train", "val", "test"):
        (release / f"basic_{part}.tsv").write_text("\r\n".join(["Source\tTarget", *lines, ""]), newline="")
    task, parts, prepared = prepare(tmp_path / "out", "listops", "--source", release)
    assert task is TASKS["listops"] and prepared["source"] == "listops"
    for part in PARTS:
        rows = [([TOKENS[i - 1] for i in row["input_ids"]], row["labels"]) for row in parts[part]]
        assert rows == [(["[MAX", "3", "[SM", "4", "8", "]", "]"], 3), (["[MED", "1", "2", "]"], 1)]

    (release / "basic_val.tsv").write_text("Source\tTarget\n[MAX 3 x ]\t3\n")
    with pytest.raises(InputError, match=r"basic_val.tsv, line 2: 'x' in an expression"):
        prepare(tmp_path / "other", "listops", "--source", release)
    (release / "basic_val.tsv").write_text("Source\tTarget\n[MAX 3 4 ]\t12\n")
    with pytest.raises(InputError, match="ends in '12'"):
        prepare(tmp_path / "other", "listops", "--source", release)
    (release / "basic_val.tsv").unlink()
    with pytest.raises(InputError, match="No such file"):
        prepare(tmp_path / "other", "listops", "--source", release)
    assert {path.name for path in tmp_path.iterdir()} == {"listops", "out"}


# Text


def test_imdb_keeps_its_test_reviews_apart(tmp_path):
    for part, count in (("train", 20), ("test", 6)):
        for label in ("neg", "pos", "unsup"):
            (tmp_path / "aclImdb" / part / label).mkdir(parents=True)
            for i in range(count):
                (tmp_path / "aclImdb" / part / label / f"{i}_7.txt").write_text(f"{part} {label} é{i}" + "x" * 5000)
    _, parts, prepared = prepare(tmp_path / "out", "text", "--source", tmp_path / "aclImdb", "--test", "8")
    assert {part: len(parts[part]) for part in PARTS} == {"train": 36, "validation": 4, "test": 8}
    assert prepared["parts"]["test"]["label_shares"] == [0.5, 0.5] and prepared["parts"]["train"]["truncated"] == 36
    for part in PARTS:
        for row in parts[part]:
            text = bytes((row["input_ids"] - 1).astype(np.uint8)).decode()
            assert len(row["input_ids"]) == 4000
            assert text.startswith(f"{'test' if part == 'test' else 'train'} {['neg', 'pos'][row['labels']]} é")


# Retrieval


def test_pairs_of_papers_are_read(tmp_path):
    release = tmp_path / "tsv_data"
    release.mkdir()
    content = b'1.0\tP05-1\tQ\tA "quoted, text\xff\tan other\n0.0\tX\tY\tno\tyes, it is\n'
    for part in ("train", "eval", "test"):
        (release / f"new_aan_pairs.{part}.tsv").write_bytes(content)
    task, parts, _ = prepare(tmp_path / "out", "retrieval", "--source", release)
    assert task.texts == 2
    rows = [
        (bytes((r["input_ids"] - 1).astype(np.uint8)), bytes((r["input_ids_2"] - 1).astype(np.uint8)), r["labels"])
        for r in parts["validation"]
    ]
    assert rows == [(b'A "quoted, text\xff', b"an other", 1), (b"no", b"yes, it is", 0)]
    (release / "new_aan_pairs.test.tsv").write_bytes(content + b"1.0\tone text\n")
    with pytest.raises(InputError, match=r"test.tsv, line 3, has 2 fields"):
        prepare(tmp_path / "other", "retrieval", "--source", release)
    budget = ["--methods", "adaptive", "--seeds", "0", "--steps", "1", "--batch-size", "2"]
    folders = ["--data", str(tmp_path / "out"), "--output-dir", str(tmp_path / "runs")]
    records = lra.main(["train", *folders, *budget])
    assert len(records[0]["losses"]) == 1


# Pathfinder


def test_discs_are_joined_if_and_only_if_the_label_says_so():
    draw = np.random.default_rng(0)
    for label in (0, 1, 0, 1, 0, 1):
        picture = draw_picture(draw, label)
        assert picture.pixels.shape == (32, 32) and picture.label == label
        assert sorted(map(len, picture.contours)) == [4] * 5 + [14] * 2
        dashes = np.concatenate(picture.contours)
        # Dashes whose ends are one gap apart hang together; nothing else comes so near.
        gaps = np.linalg.norm(dashes[:, None, :, None] - dashes[None, :, None, :], axis=-1).min((2, 3))
        joined = gaps < GAP + 1e-6
        assert (gaps[~joined] > (GAP + CLEARANCE) / 2).mean() > 0.95
        reached = {int(np.linalg.norm(dashes - picture.markers[0], axis=-1).min(1).argmin())}
        while (more := {int(j) for i in reached for j in np.flatnonzero(joined[i])}) - reached:
            reached |= more
        ends = np.linalg.norm(dashes - picture.markers[1], axis=-1).min(1)
        assert (int(ends.argmin()) in reached) == bool(label) and ends.min() < 1e-6
        for x, y in picture.markers:
            assert picture.pixels[int(y), int(x)] == 255


def test_pictures_of_both_labels_are_generated(tmp_path):
    counts = ("--train", "6", "--validation", "2", "--test", "4")
    _, parts, prepared = prepare(tmp_path / "out", "pathfinder", *counts)
    for part, count in zip(PARTS, (6, 2, 4), strict=True):
        assert len(parts[part]) == count and prepared["parts"][part]["label_shares"] == [0.5, 0.5]
        assert all(len(row["input_ids"]) == 1024 and row["input_ids"].min() == 1 for row in parts[part])


def test_pathfinder_of_the_release_is_read(tmp_path):
    release = tmp_path / "curv_contour_length_14"
    (release / "metadata").mkdir(parents=True)
    (release / "imgs" / "0").mkdir(parents=True)
    lines = []
    for i in range(21):
        name = f"sample_{i}.png"
        lines.append(f"imgs/0 {name} {i} {i % 2} 1.0 2 0.75\n")
        Image.fromarray(np.full((32, 32), 10 * i, np.uint8)).save(release / "imgs" / "0" / name)
    (release / "imgs" / "0" / "sample_20.png").write_bytes(b"")  # as a few of the release are
    (release / "metadata" / "0.npy").write_text("".join(lines))
    _, parts, _ = prepare(tmp_path / "out", "pathfinder", "--source", release)
    seen = sorted((int(row["input_ids"][0]) - 1, int(row["labels"])) for part in PARTS for row in parts[part])
    assert seen == [(10 * i, i % 2) for i in range(20)]
    assert sum(len(parts[part]) for part in PARTS[1:]) in (3, 4)

    (release / "imgs" / "0" / "sample_3.png").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"sample_3.png is no PNG"):
        prepare(tmp_path / "other", "pathfinder", "--source", release)
    content = io.BytesIO()
    Image.new("L", (64, 64)).save(content, "PNG")
    (release / "imgs" / "0" / "sample_3.png").write_bytes(content.getvalue())
    with pytest.raises(InputError, match="64 x 64 pixels"):
        prepare(tmp_path / "other", "pathfinder", "--source", release)
    (release / "metadata" / "0.npy").write_text("../.. secret.png 0 1\n")
    with pytest.raises(InputError, match="line 1"):
        prepare(tmp_path / "other", "pathfinder", "--source", release)


# Image


def test_the_binary_version_of_cifar_is_read(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    draw = np.random.default_rng(0)
    records = draw.integers(0, 256, (6, 4, 3073), dtype=np.uint8)
    records[:, :, 0] = draw.integers(0, 10, (6, 4))
    for i, batch in enumerate(records):
        name = f"data_batch_{i + 1}.bin" if i < 5 else "test_batch.bin"
        (folder / name).write_bytes(batch.tobytes())
    task, parts, _ = prepare(tmp_path / "out", "image", "--source", folder)
    assert {part: len(parts[part]) for part in PARTS} == {"train": 18, "validation": 2, "test": 4}
    rows = [row for part in ("train", "validation", "test") for row in parts[part]]
    for row, record in zip(rows, records.reshape(-1, 3073), strict=True):
        red, green, blue = record[1:].reshape(3, 1024).astype(float)
        assert row["labels"] == record[0] and row["input_ids"].max() < task.vocabulary
        luma = (0.2989 * red + 0.587 * green + 0.114 * blue) * 255.5 / 255  # TensorFlow scales by one half more
        clear = np.abs(luma - luma.round()) > 1e-3
        assert clear.mean() > 0.9
        np.testing.assert_array_equal((row["input_ids"] - 1)[clear], np.floor(luma)[clear])
    assert (grey(np.full((3, 2, 2), 255, np.uint8)) == 255).all() and (grey(np.zeros((3, 2), np.uint8)) == 0).all()

    (folder / "test_batch.bin").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="has 100 bytes"):
        prepare(tmp_path / "other", "image", "--source", folder)
    (folder / "data_batch_1").write_bytes(b"")
    with pytest.raises(InputError, match="pickles can run any code"):
        prepare(tmp_path / "other", "image", "--source", folder)


# Prepared data


def test_bad_rows_leave_nothing_behind(tmp_path):
    good = {"input_ids": [1, 2], "labels": 0}
    for bad, message in (({"input_ids": [], "labels": 0}, "empty"), ({"input_ids": [1], "labels": 2}, "label 2")):
        with pytest.raises(InputError, match=message):
            write_prepared(TASKS["text"], {"train": [good], "validation": [good], "test": [bad]}, tmp_path / "x", {})
    with pytest.raises(InputError, match="no validation examples"):
        write_prepared(TASKS["text"], {"train": [good], "validation": [], "test": [good]}, tmp_path / "x", {})
    assert not (tmp_path / "x").exists()
    prepared = write_prepared(TASKS["text"], {part: [good] for part in PARTS}, tmp_path / "x", {"source": "here"})
    assert json.loads((tmp_path / "x" / "prepared.json").read_text()) == prepared
