"""scripts/benchmark_embeddings.py on a few generated reviews."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark_embeddings
from _benchmark import find_minilm

import hf_skein


@pytest.fixture
def reviews(tmp_path):
    """Reviews whose label shows in their last words only; four folds."""
    draw = random.Random(0)
    for label, verdict in (("neg", "awful boring terrible film "), ("pos", "wonderful brilliant moving film ")):
        (tmp_path / "reviews" / label).mkdir(parents=True)
        for i in range(8):
            story = draw.choices(["river", "bridge", "house", "man", "night", "train"], k=draw.randrange(60, 90))
            (tmp_path / "reviews" / label / f"cv{i % 4}{i}.txt").write_text(" ".join(story) + " " + verdict * 20)
    return tmp_path / "reviews"


def run(reviews, output, *arguments):
    lengths = ["--max-length", "200", "--truncate", "50", "--tokens-per-batch", "500"]
    return benchmark_embeddings.main(
        ["--documents", str(reviews), "--output", str(output), *lengths, *map(str, arguments)]
    )


@torch.no_grad()
def test_accuracies_and_cosines_are_those_of_a_direct_computation(reviews, tmp_path):
    record = run(reviews, tmp_path / "x", "--cases", "exact", "truncated", "--setting", "mine:num_columns=32")
    exact, truncated, mine = record["rows"]
    assert [row["case"] for row in record["rows"]] == ["exact", "truncated", "mine"]
    assert record["count"] == 16 and record["truncated"] == 16 and 130 < record["mean_tokens"] <= 200

    model, tokenizer = AutoModel.from_pretrained(find_minilm()).eval(), AutoTokenizer.from_pretrained(find_minilm())
    files = sorted(reviews.rglob("*.txt"))
    labels, folds = np.array([file.parent.name for file in files]), np.array([file.name[2] for file in files])

    def embed():
        result = []
        for file in files:
            inputs = tokenizer(file.read_text(), truncation=True, max_length=200, return_tensors="pt")
            result.append(model(**inputs).last_hidden_state.mean(1)[0].numpy())
        return np.stack([x / np.linalg.norm(x) for x in result])

    ours = embed()
    for fold, accuracy in zip("0123", exact["fold_accuracies"], strict=True):
        classifier = LogisticRegression(C=30).fit(ours[folds != fold], labels[folds != fold])
        assert classifier.score(ours[folds == fold], labels[folds == fold]) == pytest.approx(accuracy)
    assert exact["accuracy"] == np.mean(exact["fold_accuracies"]) > truncated["accuracy"]
    assert exact["cosine_min"] == pytest.approx(1) and truncated["cosine_mean"] < 0.95

    model.set_attn_implementation("skein")
    hf_skein.configure(model, min_length=0, num_columns=32)
    cosines = (ours * embed()).sum(-1)
    assert mine["cosine_mean"] == pytest.approx(cosines.mean(), abs=1e-4)
    assert mine["cosine_min"] == pytest.approx(cosines.min(), abs=1e-4)
    assert 0.8 < mine["cosine_min"] < 1
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 for row in record["rows"])

    assert str(tmp_path) not in (tmp_path / "x.json").read_text()
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"reviews", "x.json", "x.png"}


def test_an_interruption_costs_one_case(reviews, tmp_path, monkeypatch):
    whole = run(reviews, tmp_path / "whole", "--cases", "exact", "truncated")
    embed, titles = benchmark_embeddings.embed, []

    def interrupted(*args, title=None):
        titles.append(title)
        if titles[-1] == "truncated" and titles.count("truncated") == 1:
            raise KeyboardInterrupt
        return embed(*args, title=title)

    monkeypatch.setattr(benchmark_embeddings, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(reviews, tmp_path / "x", "--cases", "exact", "truncated")
    (row,) = json.loads((tmp_path / "x.partial.json").read_text())["parts"]["exact"]
    record = run(reviews, tmp_path / "x", "--cases", "exact", "truncated")
    assert list(filter(None, titles)) == ["exact", "truncated", "truncated"]
    assert record["rows"][0] == row
    for one, other in zip(record["rows"], whole["rows"], strict=True):
        assert one["accuracy"] == other["accuracy"]
        assert one["cosine_mean"] == pytest.approx(other["cosine_mean"], abs=1e-6)


def test_folds_must_be_found(reviews, tmp_path):
    with pytest.raises(SystemExit, match=r"is not in the name 'neg/cv00.txt'"):
        run(reviews, tmp_path / "x", "--fold-regex", "fold(.)")
    with pytest.raises(SystemExit, match=r"only the fold c"):
        run(reviews, tmp_path / "x", "--fold-regex", "/(c)")
