"""scripts/benchmark_fidelity.py: its figures are those of a direct computation."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark_fidelity
from _benchmark import LayerInputs, find_minilm

import hf_skein


LAYER, N = 2, 200
SETTINGS = ("--settings", "none", "--setting", "few:num_columns=32", "--setting", "more:num_columns=64")


def run(text, output, *arguments):
    return benchmark_fidelity.main(["--text", str(text), "--output", str(output), *map(str, arguments)])


@pytest.fixture
def model():
    return AutoModel.from_pretrained(find_minilm()).eval()


@pytest.fixture
def ids(text):
    tokenizer = AutoTokenizer.from_pretrained(find_minilm())
    return tokenizer(text.read_text(), truncation=True, max_length=N, return_tensors="pt")["input_ids"]


@torch.no_grad()
def test_the_figures_of_a_layer_are_those_of_a_direct_computation(text, tmp_path, model, ids):
    record = run(text, tmp_path / "x", *SETTINGS, "--lengths", N, "--layers", LAYER)
    hidden = model(ids, output_hidden_states=True).hidden_states[LAYER]
    attention = model.encoder.layer[LAYER].attention.self
    split = functools.partial(torch.Tensor.unflatten, dim=-1, sizes=(12, 32))
    query, key, value = (split(f(hidden)).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    exact = (query @ key.mT / 32**0.5).softmax(-1) @ value
    rows = {row["method"]: row for row in record["rows"] if row["of"] == "attention"}
    for name, columns in (("few", 32), ("more", 64)):
        config = hf_skein.SkeinConfig(min_length=0, num_columns=columns)
        output = hf_skein.skein_attention(query, key, value, config=config, layer=LAYER)
        for head in range(12):
            ours, right = output[0, head], exact[0, head]
            row = {figure: rows[name][figure][head] for figure in ("frobenius", "spectral", "token_cosine")}
            assert row["frobenius"] == pytest.approx(((ours - right).norm() / right.norm()).item(), rel=1e-3)
            spectral = torch.linalg.matrix_norm(ours - right, 2) / torch.linalg.matrix_norm(right, 2)
            assert row["spectral"] == pytest.approx(spectral.item(), rel=1e-3)
            cosines = (ours * right).sum(-1) / ours.norm(dim=-1) / right.norm(dim=-1)
            assert row["token_cosine"] == pytest.approx(cosines.mean().item(), rel=1e-4)
    means = {name: sum(rows[name]["frobenius"]) / 12 for name in rows}
    assert {name: by[str(N)] for name, by in record["summary"]["frobenius"].items()} == pytest.approx(means)
    assert 0 < means["oracle, 128 columns"] < means["oracle, 64 columns"] < 1
    assert means["more"] < means["few"] < 1


@torch.no_grad()
def test_the_document_cosine_is_that_of_a_direct_computation(text, tmp_path, model, ids):
    record = run(text, tmp_path / "x", *SETTINGS, "--lengths", N, "--layers", LAYER)
    exact = model(ids).last_hidden_state.mean(1)
    model.set_attn_implementation("skein")
    for name, columns in (("few", 32), ("more", 64)):
        hf_skein.configure(model, min_length=0, num_columns=columns)
        cosine = torch.cosine_similarity(model(ids).last_hidden_state.mean(1), exact).item()
        assert 0.5 < cosine < 0.9999
        assert record["summary"]["document_cosine"][name][str(N)] == pytest.approx(cosine, abs=1e-5)


@torch.no_grad()
def test_documents_are_compared_one_by_one(text, tmp_path, model, ids):
    for label in ("good", "bad"):
        (tmp_path / "reviews" / label).mkdir(parents=True)
        (tmp_path / "reviews" / label / "long.txt").write_text(text.read_text())
        (tmp_path / "reviews" / label / "short.txt").write_text("Too short to be of use.")
    documents = ("--documents", tmp_path / "reviews", "--num-documents", 2, "--document-length", N)
    record = run(text, tmp_path / "x", *SETTINGS, "--lengths", 100, "--layers", 0, *documents)
    (row,) = (row for row in record["rows"] if row["of"] == "documents" and row["method"] == "few")
    exact = model(ids).last_hidden_state.mean(1)
    model.set_attn_implementation("skein")
    hf_skein.configure(model, min_length=0, num_columns=32)
    cosine = torch.cosine_similarity(model(ids).last_hidden_state.mean(1), exact).item()
    assert row["cosines"] == pytest.approx([cosine, cosine], abs=1e-4)
    assert row["document_cosine"] == record["summary"]["document_cosine"]["few"]["documents"]
    assert str(tmp_path) not in (tmp_path / "x.json").read_text()


def test_oracles_are_their_definitions(monkeypatch):
    monkeypatch.setattr(benchmark_fidelity, "COLUMNS", (3, 5, 99))
    monkeypatch.setattr(benchmark_fidelity, "WINDOW", 4)
    monkeypatch.setattr(benchmark_fidelity, "LOGITS_PER_STEP", 2 * 7 * 20)
    query, key, value = torch.randn(3, 2, 20, 4, dtype=torch.float64)
    outputs = benchmark_fidelity.oracles(LayerInputs(query, key, value, 0.7))
    assert outputs.keys() == {"window of 4 and CLS", "oracle, 3 columns", "oracle, 5 columns"}
    for head in range(2):
        for i in range(20):
            logits = 0.7 * key[head] @ query[head, i]
            window = range(20) if i == 0 else {0, *range(max(0, i - 2), min(20, i + 2))}
            kept = {
                "window of 4 and CLS": sorted(window),
                "oracle, 3 columns": logits.argsort()[-3:],
                "oracle, 5 columns": logits.argsort()[-5:],
            }
            for name, columns in kept.items():
                weights = logits[columns].exp() / logits[columns].exp().sum()
                torch.testing.assert_close(outputs[name][head, i], weights @ value[head, columns])


def test_the_whole_table_and_its_picture(text, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_fidelity, "COLUMNS", (16, 32))
    record = run(text, tmp_path / "x", "--lengths", 280, "--layers", 1, "--dtype", "float64")
    error = {method: by["280"] for method, by in record["summary"]["frobenius"].items()}
    for family in ("skeinformer", "oracle", *(f"adaptive, block {size}, 64 strata" for size in (64, 128, 256, 512))):
        assert error[f"{family}, 32 columns"] < error[f"{family}, 16 columns"]
    assert error["adaptive, block 64, 64 strata, 32 columns"] < error["adaptive, block 256, 64 strata, 32 columns"]
    assert error["default"] < error["default, 32 strata"] < error["default, 1 stratum"] < error["V-Mean"]
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_an_interrupted_run_equals_one_that_was_not(text, tmp_path, monkeypatch):
    arguments = (*SETTINGS, "--lengths", 80, 120, "--layers", 1, "--positions", "interpolate", "--random-weights")
    whole = run(text, tmp_path / "whole", *arguments)
    compute, calls = benchmark_fidelity.attention_rows, []

    def interrupted(args, methods, length):
        calls.append(length)
        if calls == [80, 120]:
            raise KeyboardInterrupt
        return compute(args, methods, length)

    monkeypatch.setattr(benchmark_fidelity, "attention_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path / "x", *arguments)
    assert run(text, tmp_path / "x", *arguments) == whole
    assert calls == [80, 120, 120]
    assert json.loads((tmp_path / "x.json").read_text()) == whole
