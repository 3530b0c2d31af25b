"""`verify`: it passes what is right, sees what is off, and measures what it says."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert_checkpoint import ENCODER_DECODER, HEADS, ROTARY, edit, longformer, tiny
from test_convert_positions import NEW, OLD
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import hf_skein
from hf_skein.convert import convert_checkpoint, verify


WORDS = [f"word{i}" for i in range(30)]
SKETCH = {"num_columns": 8, "num_strata": 2, "block_size": 4, "min_length": 8}


def word_tokenizer():
    """One token per word, between `<s>` and `</s>`."""
    core = Tokenizer(
        models.WordLevel(
            {"[UNK]": 0, "<s>": 1, "</s>": 2, "[PAD]": 3} | {w: 4 + i for i, w in enumerate(WORDS)}, "[UNK]"
        )
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", model_max_length=OLD)


def write_words(path):
    """200 random words, each of them one token."""
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=200)))
    return path


@pytest.fixture
def words(tmp_path):
    return write_words(tmp_path / "words.txt")


def convert(model, tmp_path, max_length=NEW, settings=SKETCH, **options):
    model.save_pretrained(tmp_path / "a")
    word_tokenizer().save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", max_length, settings=settings, **options)
    return tmp_path / "a", tmp_path / "b"


def run(folders, words, **options):
    return verify.verify(*folders, **{"text": words, "min_cosine": -1, "repeats": 1, **options})


def off(found):
    return [check.name for check in found.checks if not check.passed]


def cases():
    for head in HEADS:
        yield "Bert", head, {}
    yield from (("Roberta", AutoModelForMaskedLM, {}), ("DistilBert", AutoModel, {}), ("Esm", AutoModel, {}))
    yield from (("Bart", AutoModelForSequenceClassification, ENCODER_DECODER), ("MBart", AutoModel, ENCODER_DECODER))
    yield from (("ModernBert", AutoModel, ROTARY["ModernBert"]), ("EuroBert", AutoModelForMaskedLM, ROTARY["EuroBert"]))
    yield from (("BigBird", AutoModelForMaskedLM, {}), ("Longformer", AutoModelForSequenceClassification, {}))


@pytest.mark.parametrize(
    ("family", "head", "options"), list(cases()), ids=lambda x: getattr(x, "__name__", str(x)[:12])
)
def test_a_right_conversion_passes(family, head, options, words, tmp_path):
    model = longformer(head) if family == "Longformer" else tiny(family, head, **options)
    found = run(convert(model, tmp_path), words)
    assert found.passed, verify.table(found)
    agreement = [check for check in found.checks if "computes what the original does" in check.name]
    assert [check.name.split(" tokens")[0] for check in agreement] == [f"up to {OLD}", "up to 8"]
    assert all(check.found.startswith("largest difference") for check in agreement)
    (row,) = found.rows
    layers = 1 if family not in ("ModernBert", "Longformer", "Bart", "MBart") else None
    assert row.length == NEW and (layers is None or len(row.relative_error) == layers)
    assert 1e-4 < row.relative_error[-1] < 2  # it was sketched


def test_figures_are_what_they_say(words, tmp_path):
    folders = convert(tiny("Roberta", num_hidden_layers=3, max_position_embeddings=OLD + 4), tmp_path)
    found = run(folders, words, documents=2, lengths=[20, NEW])
    assert [row.length for row in found.rows] == [20, NEW]
    models = [AutoModel.from_pretrained(folders[1], attn_implementation=a).eval() for a in ("sdpa", "skein")]
    content = words.read_text().split()
    expected = []
    for document in range(2):
        piece = content[document * NEW :][: 20 - 2]
        ids = torch.tensor([[1, *(4 + WORDS.index(word) for word in piece), 2]])
        exact, skein = (torch.stack(m(ids, output_hidden_states=True).hidden_states[1:])[:, 0] for m in models)
        cosine = torch.nn.functional.cosine_similarity
        expected.append(
            torch.stack(
                [
                    (skein - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1),
                    cosine(skein, exact, dim=-1).mean(-1),
                    cosine(skein.mean(1), exact.mean(1), dim=-1),
                ]
            )
        )
    row = found.rows[0]
    measured = torch.tensor([row.relative_error, row.token_cosine, row.document_cosine])
    torch.testing.assert_close(measured, torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)
    assert row.least_cosine == pytest.approx(min(cosines[2, -1].item() for cosines in expected), abs=1e-5)
    assert row.least_cosine < row.document_cosine[-1]
    assert row.exact_seconds > 0 and row.skein_seconds > 0
    assert found.text["name"] == "words.txt" and len(found.text["sha256"]) == 64


def test_exact_settings_give_no_error(words, tmp_path):
    found = run(convert(tiny("Bert"), tmp_path, settings={"method": "exact"}), words, min_cosine=0.99999)
    assert found.passed and found.rows[0].relative_error[-1] < 1e-6


def test_peak_memory_is_seen():
    device = torch.device("cpu")
    before = verify._start_of_peak(device)
    if before is None:
        pytest.skip("this system does not tell the peak of resident memory")
    torch.ones(2**24)  # 64 MiB, freed at once
    assert 60 < (verify._peak(device) - before) / 2**20 < 80


# --- what is off ---


def spoil(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def nudge(weights):
    weights["encoder.layer.0.output.dense.weight"][0, 0] += 0.01


def break_(weights):
    weights["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")


@pytest.mark.parametrize("change", [nudge, break_])
def test_another_weight_is_seen(change, words, tmp_path):
    folders = convert(tiny("Bert"), tmp_path)
    spoil(folders[1], change)
    found = run(folders, words)
    assert not found.passed
    names = off(found)
    assert "up to 12 tokens, exact attention computes what the original does" in names
    assert "up to 8 tokens, skein computes what the original does" in names
    assert ("skein's hidden states are finite" in names) is (change is break_)


def test_another_class_settings_and_limit_are_seen(words, tmp_path):
    folders = convert(tiny("Bert"), tmp_path)
    edit(folders[1] / "tokenizer_config.json", model_max_length=4096)
    config = json.loads((folders[1] / "config.json").read_text())
    del config["skein"]
    (folders[1] / "config.json").write_text(json.dumps(config))
    assert off(run(folders, words)) == ["config.skein is set", "the tokenizer's limit is the model's"]
    other = tmp_path / "other"
    other.mkdir()
    names = off(run((convert(tiny("Roberta"), other)[0], folders[1]), words))
    assert "the class and the names of its weights are the original's" in names
    source = convert(longformer(AutoModel), tmp_path / "sparse")[0]
    names = off(run((source, folders[1]), words))
    assert "the class and the names of its weights are those that the original is converted to" in names


def test_documents_that_lose_their_direction_are_seen(words, tmp_path):
    folders = convert(tiny("Bert"), tmp_path, settings={"method": "vmean", "min_length": 8, "num_columns": 8})
    found = run(folders, words, min_cosine=1.0)
    assert off(found) == ["each document keeps a cosine of 1"]


def test_interpolated_positions_need_not_agree(words, tmp_path):
    folders = convert(tiny("Bert"), tmp_path, positions="interpolate")
    found = run(folders, words)
    assert found.passed and any("interpolated positions change all" in check.found for check in found.checks)
    (folders[1] / "skein_conversion.json").unlink()  # then nobody knows why
    assert not run(folders, words).passed


def test_a_rounded_model_is_compared_with_the_rounded_original(words, tmp_path):
    assert run(convert(tiny("Bert"), tmp_path, dtype="bfloat16"), words).passed


# --- text ---


def test_text_and_lengths_must_do(words, tmp_path):
    folders = convert(tiny("Bert"), tmp_path)
    few = tmp_path / "few.txt"
    few.write_text(" ".join(words.read_text().split()[:30]))  # enough for the lengths, not to compare the models
    with pytest.raises(ValueError, match=rf"3 documents of {OLD} tokens are asked for, and the text has 30"):
        run(folders, few, lengths=[10])
    with pytest.raises(ValueError, match=r"7 documents of 31 tokens are asked for, and the text has 200"):
        run(folders, words, documents=7)
    for wrong in ([32], [1], [0, 31]):
        with pytest.raises(ValueError, match=r"lengths must be from 2 to 31"):
            run(folders, words, lengths=wrong)
    words.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"words.txt is no UTF-8 text"):
        run(folders, words)
    with pytest.raises(FileNotFoundError):
        run(folders, tmp_path / "nothing.txt")


def test_the_built_in_sample(tmp_path, monkeypatch):
    folders = convert(tiny("Bert"), tmp_path)
    found = run(folders, None)
    assert found.passed and found.text["name"].startswith("documentation of Python 3.")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"give a text \(--text\)"):
        run(folders, None)


def test_default_lengths_grow_to_the_limit(words, tmp_path):
    words.write_text(" ".join(random.Random(0).choices(WORDS, k=5000)))
    found = run(convert(tiny("Bert"), tmp_path, 2500, settings={"num_columns": 64}), words, documents=1)
    assert [row.length for row in found.rows] == [1024, 2048, 2500]
    assert hf_skein.SkeinConfig.from_dict(found.skein).num_columns == 64


def test_the_page_shows_the_record():
    root = Path(__file__).parents[1]
    record = json.loads((root / "benchmarks" / "results" / "conversion_minilm.json").read_text())
    found = verify.Verification.from_dict(record)
    assert found.passed == record["passed"]
    assert verify.table(found) in (root / "docs" / "conversion.md").read_text()
