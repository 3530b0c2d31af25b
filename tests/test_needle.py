"""scripts/needle.py: its documents, what each method can see of them, and a run on tiny sizes."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import needle
from _benchmark import find_minilm


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(find_minilm())


@pytest.fixture(scope="module")
def documents(tokenizer):
    return needle.write_documents(tokenizer, 1024, 16, "seed")


def bits(tokenizer, ids: torch.Tensor) -> list[int]:
    """What the statements among some tokens say, in their order."""
    words = dict(zip(map(tokenizer.convert_tokens_to_ids, needle.WORDS_OF_BIT), (0, 1), strict=True))
    return [words[token] for token in ids.tolist() if token in words]


def test_labels_tell_whether_the_statements_agree(tokenizer, documents):
    assert documents.ids.shape == (16, 1024)
    cases = [tuple(bits(tokenizer, ids)) for ids in documents.ids]
    assert sorted(cases) == sorted([(0, 0), (0, 1), (1, 0), (1, 1)] * 4)
    assert documents.labels.tolist() == [int(first == second) for first, second in cases]


def test_statements_lie_in_the_first_and_the_last_quarter(tokenizer, documents):
    for ids, places in zip(documents.ids, documents.places.tolist(), strict=True):
        (begin, end), (second_begin, second_end) = places
        assert 1 <= begin < end <= 256 and 768 <= second_begin < second_end <= 1023
        for first, last, forms in ((begin, end, 0), (second_begin, second_end, 1)):
            said = tokenizer.decode(ids[first:last])
            whole = [form.format(word).lower() for form in needle.STATEMENTS[forms] for word in needle.WORDS_OF_BIT]
            assert said.replace(" .", ".") in whole
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id


def test_truncation_and_chunks_never_hold_both_statements(tokenizer, documents):
    (truncated,) = needle.cut(documents.ids, "truncated", 512)
    assert truncated.shape == (16, 512)
    assert all(len(bits(tokenizer, ids)) == 1 for ids in truncated)
    chunks = needle.cut(documents.ids, "pooled", 512)
    assert len(chunks) == 3 and max(chunk.shape[1] for chunk in chunks) <= 512
    assert all(len(bits(tokenizer, ids)) <= 1 for chunk in chunks for ids in chunk)
    for chunk in (*chunks, truncated):
        assert (chunk[:, 0] == tokenizer.cls_token_id).all() and (chunk[:, -1] == tokenizer.sep_token_id).all()
    body = torch.cat([chunk[:, 1:-1] for chunk in chunks], 1)
    assert torch.equal(body, documents.ids[:, 1:-1])
    for method in ("exact", "skein"):
        (whole,) = needle.cut(documents.ids, method, 512)
        assert whole is documents.ids


def test_pooling_adds_up_what_chunks_say():
    """The logits of a document are the mean of those of its chunks: no sum of two terms is an exclusive or."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = needle.Classifier(BertModel(BertConfig(vocab_size=50, **sizes))).eval()
    torch.nn.init.normal_(model.linear.weight)
    chunks = [torch.randint(50, (3, 9)) for _ in range(4)]
    torch.testing.assert_close(model(chunks), torch.stack([model([chunk]) for chunk in chunks]).mean(0))


def test_documents_are_a_function_of_the_seed(tokenizer, documents):
    again, other = (needle.write_documents(tokenizer, 1024, 16, seed) for seed in ("seed", "other"))
    assert torch.equal(again.ids, documents.ids) and not torch.equal(other.ids, documents.ids)


TINY = ["--lengths", "160", "--chunk", "80", "--short-length", "70", "--short-steps", "2", "--short-tokens", "8"]
TINY += ["--train-documents", "4", "--test-documents", "4", "--skein", "min_length=0,num_columns=16,block_size=16"]


def test_a_run_continues_after_an_interruption(tmp_path, monkeypatch):
    run_case, cases = needle.run_case, []

    def interrupted(args, method, *more):
        cases.append(method)
        if cases == ["truncated", "pooled"]:
            raise KeyboardInterrupt
        return run_case(args, method, *more)

    monkeypatch.setattr(needle, "run_case", interrupted)
    arguments = ["--output", str(tmp_path / "x"), *TINY]
    with pytest.raises(KeyboardInterrupt):
        needle.main(arguments)
    assert list(json.loads((tmp_path / "x.partial.json").read_text())["parts"]) == ["short", "truncated 160"]
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".pt"} == {
        "x.short.partial.pt",
        "x.truncated-160.partial.pt",
    }
    record = needle.main(arguments)
    assert cases == ["truncated", "pooled", "pooled", "exact", "skein"]
    assert [row["method"] for row in record["rows"]] == ["short", *needle.METHODS]
    assert all(len(row["losses"]) == 1 and 0 <= row["accuracy"] <= 1 for row in record["rows"][1:])
    assert record["skein"]["num_columns"] == 16 and record["train_documents"] == 4
    losses = {row["method"]: row["losses"] for row in record["rows"]}
    assert losses["exact"] != losses["skein"] != losses["pooled"] != losses["truncated"]
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", "x.png"}


def test_each_method_goes_on_from_its_own_weights(tmp_path, monkeypatch):
    read = {}
    run_case = needle.run_case

    def spy(args, method, length, model, tokenizer, before, after):
        read[method, length] = torch.load(before)["linear.weight"]
        row = run_case(args, method, length, model, tokenizer, before, after)
        assert not torch.equal(torch.load(after)["linear.weight"], read[method, length])
        read[method, "after", length] = torch.load(after)["linear.weight"]
        return row

    monkeypatch.setattr(needle, "run_case", spy)
    options = [*TINY, "--lengths", "192", "160", "--methods", "pooled", "exact", "--longest-exact", "160"]
    record = needle.main(["--output", str(tmp_path / "x"), *options])
    assert [(row["method"], row["length"]) for row in record["rows"][1:]] == [
        ("pooled", 160),
        ("exact", 160),
        ("pooled", 192),
    ]
    assert torch.equal(read["pooled", 160], read["exact", 160])
    assert torch.equal(read["pooled", 192], read["pooled", "after", 160])
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", "x.png"}


def test_short_documents_grow():
    args = argparse.Namespace(seed=3, short_steps=150, short_length=512, short_tokens=1536)
    lengths, counts = zip(*needle.short_batches(args), strict=True)
    assert min(lengths) == lengths[0] == needle.SHORTEST and 341 <= lengths[-1] <= 512
    assert max(lengths[:50]) < 110 < 230 < min(lengths[-10:])
    assert all(count == max(8, 1536 // n // 4 * 4) for n, count in zip(lengths, counts, strict=True))


def test_lengths_that_one_chunk_could_hold_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        needle.main(["--output", str(tmp_path / "x"), "--lengths", "1000"])
    assert "must have twice --chunk tokens, 1024, at least" in capsys.readouterr().err
