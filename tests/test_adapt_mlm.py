"""scripts/adapt_mlm.py: pieces and masks, that it learns, losses before and after, and what it refuses."""

import json
import math
import random

import _data
import _finetuning
import adapt_mlm as script
import pytest
import torch
from _finetuning import finetune
from peft import PeftModel
from tiny_encoder import WORDS, make_encoder, options
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM, BertModel


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder"), BertForMaskedLM)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Lines of some 1,200 characters, each of two words."""
    draw, lines = random.Random(0), []
    for _ in range(40):
        lines.append(" ".join(draw.choices(draw.sample(WORDS, 2), k=draw.randint(340, 400))))
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_task(encoder, text, folder, *more):
    arguments = ["--model", encoder, "--dataset", str(text), "--output-dir", str(folder), *map(str, more)]
    task = script.MaskedLanguageModeling(_finetuning.make_parser(script.MaskedLanguageModeling).parse_args(arguments))
    task.tokenizer = AutoTokenizer.from_pretrained(encoder)
    return task


def test_a_text_file_becomes_documents_and_loses_nothing(tmp_path, text):
    table = script.text_table(text, tmp_path, 1000)
    documents = [json.loads(line)["text"] for line in table.read_text().splitlines()]
    assert "".join(documents) == text.read_text()
    assert all(1000 <= len(document) < 3000 for document in documents[:-1]) and len(documents) > 20


def test_pieces_and_masks(tmp_path, encoder, text):
    task = make_task(encoder, text, tmp_path, "--max-length", 42)
    tokenizer = task.tokenizer
    document = " ".join(random.Random(1).choices(WORDS, k=4000))
    pieces = task.encode([{"text": document}, {"text": "w1"}])
    assert [len(piece["input_ids"]) for piece in pieces] == [42] * 100 + [3]
    original = [
        [label if label != -100 else i for i, label in zip(piece["input_ids"], piece["labels"], strict=True)]
        for piece in pieces
    ]
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert all(ids[0] == begin and ids[-1] == end for ids in original)
    tokens = [token for ids in original[:-1] for token in ids[1:-1]]
    assert tokens == tokenizer(document, add_special_tokens=False)["input_ids"]

    asked = [
        (i, label) for p in pieces[:-1] for i, label in zip(p["input_ids"], p["labels"], strict=True) if label >= 0
    ]
    assert len(asked) == 100 * round(0.15 * 40)
    masked = sum(i == tokenizer.mask_token_id for i, _ in asked) / len(asked)
    kept = sum(i == label for i, label in asked) / len(asked)
    assert masked == pytest.approx(0.8, abs=0.06) and 0.05 < kept < 0.17
    assert task.encode([{"text": document}])[:100] == pieces[:100]  # a function of the piece
    other = make_task(encoder, text, tmp_path, "--max-length", 42, "--seed", 1).encode([{"text": document}])
    assert other[0]["labels"] != pieces[0]["labels"]
    assert script.MaskedLanguageModeling.weight(task, task.collate(pieces)) == len(asked) + 1


def test_it_learns_and_reports_exact_and_sketched_loss(tmp_path, encoder, text):
    output = tmp_path / "run"
    sketch = ["--skein-min-length", "0", "--skein-num-columns", "8", "--skein-block-size", "16"]
    more = ["--attn", "skein", "--max-length", 96, "--document-characters", 900, *sketch]
    more += ["--batch-size", 4, "--epochs", 2]
    record = finetune(script.MaskedLanguageModeling, options(encoder, text, output, *more))
    assert len(record["validation"]) == 3 and record["validation"][0]["step"] == 0
    before, after = record["validation"][0], record["validation"][-1]
    chance = math.log(len(WORDS))  # what a model that looks at no other word can reach
    assert max(after["loss"], after["exact_loss"]) < 0.95 * chance < min(before["loss"], before["exact_loss"])
    assert before["loss"] != before["exact_loss"]
    assert all(row["perplexity"] == pytest.approx(math.exp(row["loss"])) for row in record["validation"])
    assert json.loads((output / "record.json").read_text()) == json.loads(json.dumps(record))
    assert record["settings"]["dataset"] == "text.jsonl" and "/" not in str(record["settings"]["dataset"])
    assert (output / "learning_curve.png").stat().st_size > 10_000

    # The losses again, directly: of the best checkpoint, by both attentions.
    best = min(record["validation"], key=lambda row: row["loss"])
    task = make_task(encoder, text, tmp_path, "--max-length", 96, "--document-characters", 900)
    rows = _data.split_rows(task.args, _data.Reader({"text": "text"}, task.check))["validation"]
    pieces = task.encode(list(rows))
    for attn, name in (("skein", "loss"), ("sdpa", "exact_loss")):
        model = AutoModelForMaskedLM.from_pretrained(output, attn_implementation=attn).eval()
        total = count = 0
        for piece in pieces:
            inputs = {key: torch.tensor([piece[key]]) for key in ("input_ids", "attention_mask", "labels")}
            asked = (inputs["labels"] != -100).sum().item()
            with torch.no_grad():
                total, count = total + model(**inputs).loss.item() * asked, count + asked
        assert total / count == pytest.approx(best[name], rel=1e-3)


def test_lora_needs_the_head_and_is_loaded_and_merged(tmp_path, encoder, text):
    more = ["--attn", "skein", "--max-length", 96, "--document-characters", 900, "--max-train-documents", 4]
    more += ["--epochs", 1, "--lora"]
    with pytest.raises(_data.InputError, match=r"lacks the head.* Train the head first, without --lora"):
        finetune(
            script.MaskedLanguageModeling,
            options(make_encoder(tmp_path / "bare", BertModel), text, tmp_path / "no", *more),
        )
    assert not (tmp_path / "no").exists()
    output = tmp_path / "run"
    finetune(script.MaskedLanguageModeling, options(encoder, text, output, *more))
    base = AutoModelForMaskedLM.from_pretrained(output / "base", attn_implementation="skein")
    ids = torch.tensor([[2, 5, 6, 4, 7, 3]])
    plain = base.eval()(ids).logits
    adapted = PeftModel.from_pretrained(base, output / "adapter").eval()(ids).logits
    assert not torch.allclose(adapted, plain)
    finetune(script.MaskedLanguageModeling, options(encoder, text, output, *more, "--resume", "--lora-merge"))
    merged = AutoModelForMaskedLM.from_pretrained(output, attn_implementation="skein").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


def test_nothing_is_too_long(tmp_path, encoder, text):
    with pytest.raises(_data.InputError, match="--too-long error: texts are cut into pieces"):
        finetune(script.MaskedLanguageModeling, options(encoder, text, tmp_path / "run", "--too-long", "error"))


def test_a_head_that_is_missing_is_told(tmp_path, text, capsys):
    plain = make_encoder(tmp_path / "plain", BertModel)
    script.AutoModelWithHead.from_pretrained(plain)
    out = capsys.readouterr().out
    assert "plain lacks cls.predictions" in out and "--attn sdpa --max-length 128" in out
    script.AutoModelWithHead.from_pretrained(make_encoder(tmp_path / "whole", BertForMaskedLM))
    assert "lacks" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "There is no file"),
        ("empty.txt", b" \n", "holds no documents"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("column.csv", b"words\na\n", "no column text"),
    ],
)
def test_bad_text(tmp_path, encoder, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(_data.InputError, match=message):
        finetune(script.MaskedLanguageModeling, options(encoder, tmp_path / name, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
