"""`convert_checkpoint`: every family and head, and that a failure leaves nothing behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import huggingface_hub
import pytest
import torch
import transformers
from test_convert_positions import FAMILIES, NEW, OLD, PAD, SIZES, make_batch, make_model, make_tokenizer, reserved_rows
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import hf_skein
from hf_skein.convert import checkpoint, convert_checkpoint


HEADS = [
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMultipleChoice,
]
SKETCH = {"num_columns": 4, "num_strata": 2, "block_size": 8, "min_length": 0}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
ENCODER_DECODER = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 24}
ENCODER_DECODER |= {"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
ROTARY = {
    "ModernBert": {"local_attention": 4, "global_attn_every_n_layers": 2, "num_hidden_layers": 2},
    "EuroBert": {"mask_token_id": 5},
    "NomicBert": {},
    "Gte": {},
    "JinaEmbeddingsV3": {},
    "Esm": {"position_embedding_type": "rotary", "mask_token_id": 5},
}


def seed_weights(model):
    """Weights with which attention and positions matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def tiny(family, head=AutoModel, **options):
    """A model of a tiny configuration of the family."""
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this Transformers has no {family}")
    if family in FAMILIES and not options:
        return seed_weights(make_model(family, head))
    config = getattr(transformers, f"{family}Config")
    sizes = {**SIZES, "max_position_embeddings": OLD, **TOKENS}
    return seed_weights(head.from_config(config(**{**sizes, **options})))


def save(model, folder, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def run(model, n=OLD):
    inputs = make_batch(n, [n])
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: x[:, None] for name, x in inputs.items()}
    with torch.no_grad():
        return model(**inputs)[0]


def check(source, destination, head, old=OLD, new=NEW):
    """What holds of every conversion: class, keys, length, settings, the same results before and after."""
    exact, info = head.from_pretrained(destination, output_loading_info=True)
    skein = head.from_pretrained(destination, attn_implementation="skein").eval()
    assert not any(info.values())
    assert type(exact) is type(source) and list(exact.state_dict()) == list(source.state_dict())
    assert (destination / "model.safetensors").exists() and not list(destination.glob("*.bin"))
    assert AutoTokenizer.from_pretrained(destination).model_max_length == new
    saved = json.loads((destination / "config.json").read_text())
    assert saved["skein"] == hf_skein.SkeinConfig(**SKETCH).to_dict()
    assert not [key for key in saved if "attn_implementation" in key]
    torch.testing.assert_close(run(exact.eval(), old), run(source, old), rtol=1e-5, atol=1e-5)
    assert run(skein, new).isfinite().all()
    assert json.loads((destination / checkpoint.RECORD).read_text())["max_length"] == new
    hf_skein.configure(skein, min_length=new)
    torch.testing.assert_close(run(skein, old), run(source, old), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        *((family, AutoModel) for family in FAMILIES if family != "MegatronBert"),
        *((family, head) for family in ("Bert", "Roberta", "DistilBert") for head in HEADS[1:]),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_family_with_a_table(family, head, tmp_path):
    source = tiny(family, head)
    done = convert_checkpoint(save(source, tmp_path / "a"), tmp_path / "b", NEW, settings=SKETCH)
    check(source, tmp_path / "b", head)
    assert (done.positions, done.old_length, done.max_length) == ("tile", OLD, NEW)
    assert (done.source, done.source_class, done.model_class) == ("a", type(source).__name__, type(source).__name__)
    assert head.from_pretrained(tmp_path / "b").config.max_position_embeddings == NEW + reserved_rows(family)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("head", [AutoModel, AutoModelForQuestionAnswering])
@pytest.mark.parametrize("family", ["Bart", "MBart"])
@pytest.mark.parametrize("positions", ["tile", "interpolate"])
def test_bart_tables_of_encoder_and_decoder(family, head, positions, tmp_path):
    source = tiny(family, head, **ENCODER_DECODER)
    convert_checkpoint(save(source, tmp_path / "a"), tmp_path / "b", NEW, settings=SKETCH, positions=positions)
    if positions == "tile":
        check(source, tmp_path / "b", head)
    base, longer = source.base_model, head.from_pretrained(tmp_path / "b").base_model
    assert longer.config.max_position_embeddings == NEW
    old, new = base.encoder.embed_positions.weight, longer.encoder.embed_positions.weight
    assert new.shape == (NEW + 2, 16) and torch.equal(new[:3], old[:3])
    assert torch.equal(new[-1], old[2 + (NEW - 1) % OLD] if positions == "tile" else old[-1])
    assert longer.decoder.embed_positions.weight.shape == (NEW + 2, 16)


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_family(family, tmp_path):
    head = AutoModelForMaskedLM if family != "Gte" else AutoModelForTokenClassification
    source = tiny(family, head, **ROTARY[family])
    done = convert_checkpoint(save(source, tmp_path / "a"), tmp_path / "b", NEW, settings=SKETCH)
    check(source, tmp_path / "b", head)
    assert done.positions == "rotary" and done.old_length == OLD
    assert "nothing changes up to 12" in done.notes[-1] and "was not trained on" in done.notes[-1]
    longer = head.from_pretrained(tmp_path / "b")
    assert longer.config.max_position_embeddings == NEW
    assert getattr(longer.config, "rope_parameters", None) == getattr(source.config, "rope_parameters", None)
    with pytest.raises(ValueError, match="no table to tile"):
        convert_checkpoint(tmp_path / "a", tmp_path / "c", NEW, positions="tile")


@pytest.mark.parametrize("family", ["ModernBert", "EuroBert"])
def test_rotary_angles_are_interpolated(family, tmp_path):
    source = tiny(family, **ROTARY[family])
    save(source, tmp_path / "a")
    done = convert_checkpoint(tmp_path / "a", tmp_path / "b", 2 * OLD, positions="interpolate")
    assert done.positions == "interpolate"
    longer = AutoModel.from_pretrained(tmp_path / "b")
    name = "full_attention_inv_freq" if family == "ModernBert" else "inv_freq"
    torch.testing.assert_close(getattr(longer.rotary_emb, name), getattr(source.rotary_emb, name) / 2)
    if family == "ModernBert":  # a window does not grow
        assert torch.equal(longer.rotary_emb.sliding_attention_inv_freq, source.rotary_emb.sliding_attention_inv_freq)
    with pytest.raises(ValueError, match="only rope_type='default' can be scaled"):
        convert_checkpoint(tmp_path / "b", tmp_path / "c", 3 * OLD, positions="interpolate")


def longformer(head, **options):
    sizes = {"max_position_embeddings": OLD + PAD + 1, "attention_window": 2 * OLD}
    return tiny("Longformer", head, **{**sizes, **options})


@pytest.mark.parametrize("head", HEADS)
def test_longformer_becomes_roberta(head, tmp_path):
    source = longformer(head)
    done = convert_checkpoint(save(source, tmp_path / "a"), tmp_path / "b", NEW, settings={"min_length": 0})
    assert done.model_class == type(source).__name__.replace("Longformer", "Roberta")
    assert "6 weights" in done.notes[1] and "query_global" in done.notes[1]
    assert done.skein["num_columns"] == 2 * OLD  # of the window
    exact = head.from_pretrained(tmp_path / "b").eval()
    skein = head.from_pretrained(tmp_path / "b", attn_implementation="skein").eval()
    assert type(exact).__name__ == done.model_class
    renamed = {key.replace("longformer.", "roberta.", 1) for key in source.state_dict() if "_global" not in key}
    assert set(exact.state_dict()) == renamed
    inputs = make_batch(OLD, [OLD])
    if head is AutoModelForMultipleChoice:
        inputs = {name: x[:, None] for name, x in inputs.items()}
    expected = source(**inputs, global_attention_mask=torch.zeros_like(inputs["input_ids"]))[0]
    torch.testing.assert_close(exact(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    assert run(skein, NEW).isfinite().all()
    assert AutoTokenizer.from_pretrained(tmp_path / "b").model_max_length == NEW


def test_longformer_keeps_its_length_unless_told_otherwise(tmp_path):
    done = convert_checkpoint(longformer(AutoModel), tmp_path / "b", tokenizer=False)
    assert (done.positions, done.old_length, done.max_length) == ("keep", OLD, OLD)


@pytest.mark.parametrize(
    "head", [AutoModel, AutoModelForMaskedLM, AutoModelForTokenClassification, AutoModelForMultipleChoice]
)
def test_bigbird_becomes_bert(head, tmp_path):
    source = tiny("BigBird", head, attention_type="original_full")
    done = convert_checkpoint(save(source, tmp_path / "a"), tmp_path / "b", NEW, settings=SKETCH)
    exact = head.from_pretrained(tmp_path / "b").eval()
    assert type(exact).__name__ == done.model_class == type(source).__name__.replace("BigBird", "Bert")
    torch.testing.assert_close(run(exact), run(source), rtol=1e-5, atol=1e-5)
    assert run(head.from_pretrained(tmp_path / "b", attn_implementation="skein").eval(), NEW).isfinite().all()


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (AutoModelForSequenceClassification, {}, "Bert computes no head as BigBirdForSequenceClassification"),
        (AutoModel, {"rescale_embeddings": True}, "config.rescale_embeddings=True, which Bert cannot represent"),
        (AutoModel, {"use_bias": False}, "config.use_bias=False"),
    ],
)
def test_a_bigbird_that_bert_cannot_be_is_refused(head, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tiny("BigBird", head, **options), tmp_path / "b", NEW, tokenizer=False)
    assert not list(tmp_path.iterdir())


# --- choices ---


def test_a_loaded_model_is_left_as_it_is(tmp_path):
    source, tokenizer = tiny("Roberta", AutoModelForMaskedLM), make_tokenizer()
    keys, config = list(source.state_dict()), source.config.to_dict()
    convert_checkpoint(source, tmp_path / "b", NEW, tokenizer=tokenizer, settings=SKETCH)
    check(source, tmp_path / "b", AutoModelForMaskedLM)
    assert list(source.state_dict()) == keys and source.config.to_dict() == config
    assert tokenizer.model_max_length == OLD
    with pytest.raises(ValueError, match="give its tokenizer"):
        convert_checkpoint(source, tmp_path / "c", NEW)
    assert not (tmp_path / "c").exists()


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    """Found in the cache of downloads, as without a network."""
    commit, cached = "0123456789abcdef" * 2 + "01234567", tmp_path / "cache" / "models--me--tiny"
    source = tiny("Roberta")
    save(source, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    done = convert_checkpoint("me/tiny", tmp_path / "b", NEW, settings=SKETCH)
    check(source, tmp_path / "b", AutoModel)
    assert (done.source, done.commit) == ("me/tiny", commit)
    refused(OSError, "me/tiny is no folder here, .* at revision v2", "me/tiny", tmp_path / "d", revision="v2")


def test_keep_changes_the_attention_only(tmp_path):
    source = save(tiny("Bert"), tmp_path / "a")
    done = convert_checkpoint(source, tmp_path / "b", positions="keep", settings=SKETCH)
    assert (done.positions, done.max_length) == ("keep", OLD)
    check(AutoModel.from_pretrained(source).eval(), tmp_path / "b", AutoModel, new=OLD)
    with pytest.raises(ValueError, match=r'positions="keep" leaves the length at 12 tokens; got max_length=31'):
        convert_checkpoint(source, tmp_path / "c", NEW, positions="keep")


@pytest.mark.parametrize("family", ["Bert", "Bart", "EuroBert"])
def test_shrinking_refuses(family, tmp_path):
    options = {"Bart": ENCODER_DECODER, "EuroBert": ROTARY["EuroBert"]}.get(family, {})
    with pytest.raises(ValueError, match=rf"max_length={OLD - 1} is less than the {OLD} tokens"):
        convert_checkpoint(tiny(family, **options), tmp_path / "b", OLD - 1, tokenizer=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype, tmp_path):
    save(tiny("Bert"), tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", NEW, dtype=dtype)
    model = AutoModel.from_pretrained(tmp_path / "b")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    convert_checkpoint(tmp_path / "b", tmp_path / "c", NEW + 1)  # kept where nothing else is said
    assert AutoModel.from_pretrained(tmp_path / "c").dtype == getattr(torch, dtype)


def test_a_pooler_that_the_checkpoint_lacks_is_not_made_up(tmp_path):
    BertModel(make_model("Bert").config, add_pooling_layer=False).save_pretrained(tmp_path / "a")
    done = convert_checkpoint(tmp_path / "a", tmp_path / "b", NEW, tokenizer=False)
    assert "has no pooler" in done.notes[0]
    _, info = AutoModel.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"pooler"}


def test_weights_without_a_place_are_named(tmp_path):
    model = tiny("Bert", AutoModelForMaskedLM)
    model.extra = nn.Linear(2, 2)
    save(model, tmp_path / "a")
    done = convert_checkpoint(tmp_path / "a", tmp_path / "b", NEW)
    assert "left out: extra.bias, extra.weight" in done.notes[0]


def test_what_sentence_transformers_needs_comes_along(tmp_path):
    source = save(tiny("Bert"), tmp_path / "a")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}, {"path": "../elsewhere"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 7, "do_lower_case": false}')
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    convert_checkpoint(source, tmp_path / "b", NEW)
    assert json.loads((tmp_path / "b" / "modules.json").read_text()) == modules
    limits = json.loads((tmp_path / "b" / "sentence_bert_config.json").read_text())
    assert limits == {"max_seq_length": NEW, "do_lower_case": False}
    assert (tmp_path / "b" / "1_Pooling" / "config.json").exists()
    convert_checkpoint(source, tmp_path / "c")  # which changes nothing but the attention
    limits = json.loads((tmp_path / "c" / "sentence_bert_config.json").read_text())
    assert limits == {"max_seq_length": 7, "do_lower_case": False}


# --- what is wrong with the source or the arguments ---


@pytest.fixture
def source(tmp_path):
    return save(tiny("Bert"), tmp_path / "a")


def refused(error, message, source, destination, **options):
    """The conversion raises, and leaves the folder of the destination as it was."""
    before = {path: path.stat().st_mtime_ns for path in destination.parent.rglob("*")}
    with pytest.raises(error, match=message):
        convert_checkpoint(source, destination, **{"max_length": NEW, **options})
    assert {path: path.stat().st_mtime_ns for path in destination.parent.rglob("*")} == before


def truncate(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length must be .* got 0"),
        ({"max_length": "31"}, "max_length must be .* got '31'"),
        ({"positions": "repeat"}, "positions must be one of 'tile', 'interpolate', 'keep', got 'repeat'"),
        ({"dtype": "int8"}, "dtype must be one of 'float32', 'float16', 'bfloat16', got 'int8'"),
        ({"settings": {"num_column": 3}}, "SkeinConfig has no field num_column"),
        ({"settings": {"num_columns": 0}}, "SkeinConfig.num_columns is 0"),
        ({"tokenizer": 3}, "tokenizer must be a tokenizer, a name, a folder or False, got int"),
        ({"revision": "main"}, "revision='main' is for a source on the Hub"),
    ],
)
def test_wrong_arguments(options, message, source, tmp_path):
    refused(ValueError, message, source, tmp_path / "b", **options)


def test_a_source_that_is_not_there(tmp_path):
    refused(FileNotFoundError, "is not a folder", str(tmp_path / "nothing"), tmp_path / "b")
    refused(FileNotFoundError, "is not a folder", "./nothing", tmp_path / "b")
    (tmp_path / "file").write_text("")
    refused(FileNotFoundError, "is not a folder", tmp_path / "file", tmp_path / "b")
    refused(
        OSError, "nobody/nothing is no folder here, and cannot be had from the Hub", "nobody/nothing", tmp_path / "b"
    )
    refused(OSError, "at revision v1", "nobody/nothing", tmp_path / "b", revision="v1")
    refused(ValueError, "source must be .* got Linear.*Merge adapters", nn.Linear(1, 1), tmp_path / "b")


def test_a_configuration_that_cannot_be_read(source, tmp_path):
    (source / "config.json").write_text('{"model_type": "bert"')
    refused(ValueError, "The configuration in .* cannot be read", source, tmp_path / "b")
    (source / "config.json").unlink()
    refused(ValueError, "The configuration in .* cannot be read", source, tmp_path / "b", tokenizer=make_tokenizer())


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_decoder": True}, "a decoder's attention is causal"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "The weights are quantized"),
        ({"architectures": ["NewModel"]}, r"\['NewModel'\], and Transformers .* has no such class"),
        ({"architectures": ["BertForTokenClassification"]}, "lacks weights of BertForTokenClassification.*classifier"),
        ({"hidden_size": 18}, "cannot be read as a BertModel"),
    ],
)
def test_a_configuration_that_does_not_fit(fields, message, source, tmp_path):
    edit(source / "config.json", **fields)
    refused(ValueError, message, source, tmp_path / "b")


def test_other_families_are_refused_by_name(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=OLD, n_embd=16, n_layer=1, n_head=2, **TOKENS))
    refused(ValueError, "type 'gpt2'.*bert.*modernbert.*longformer", gpt2, tmp_path / "b", tokenizer=False)
    mpnet = tiny("MPNet", max_position_embeddings=16)
    refused(ValueError, "type 'mpnet' cannot be converted", mpnet, tmp_path / "b", tokenizer=False)


@pytest.mark.parametrize("keep", [0, 0.001, 0.5, 0.99])
def test_truncated_safetensors(keep, source, tmp_path):
    truncate(source / "model.safetensors", keep)
    refused(ValueError, "cannot be read as a BertModel.*truncated, download it again", source, tmp_path / "b")


def test_a_missing_shard(tmp_path):
    source = tmp_path / "a"
    tiny("Bert").save_pretrained(source, max_shard_size="4KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 1
    convert_checkpoint(source, tmp_path / "b", NEW, tokenizer=False)
    shards[0].unlink()
    refused(ValueError, "cannot be read as a BertModel", source, tmp_path / "c", tokenizer=False)


def test_pickles_are_refused_unless_asked_for(source, tmp_path):
    model = AutoModel.from_pretrained(source).eval()
    (source / "model.safetensors").unlink()
    refused(ValueError, r"no weights in the safetensors format \(found: no safetensors\)", source, tmp_path / "b")
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    refused(ValueError, r"found: pytorch_model.bin\).*--allow-pickle", source, tmp_path / "b")
    convert_checkpoint(source, tmp_path / "b", NEW, allow_pickle=True, settings=SKETCH)
    check(model, tmp_path / "b", AutoModel)
    truncate(source / "pytorch_model.bin", 0.5)
    refused(ValueError, "cannot be read as a BertModel", source, tmp_path / "c", allow_pickle=True)


def test_a_pickle_that_would_run_code_does_not(source, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    (source / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as a BertModel"):
        convert_checkpoint(source, tmp_path / "b", NEW, allow_pickle=True)
    assert not (tmp_path / "boom").exists() and not (tmp_path / "b").exists()


def test_a_missing_tokenizer(tmp_path):
    source = save(tiny("Bert"), tmp_path / "a", tokenizer=False)
    refused(ValueError, "has no tokenizer: there is none of .*tokenizer.json.*--no-tokenizer", source, tmp_path / "b")
    convert_checkpoint(source, tmp_path / "b", NEW, tokenizer=False)
    assert not list((tmp_path / "b").glob("tokenizer*"))
    make_tokenizer().save_pretrained(tmp_path / "t")
    convert_checkpoint(source, tmp_path / "c", NEW, tokenizer=tmp_path / "t")
    assert AutoTokenizer.from_pretrained(tmp_path / "c").model_max_length == NEW


def test_a_tokenizer_that_is_damaged_or_of_another_model(source, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(50)])
    refused(ValueError, "knows 53 tokens, BertModel only 40", source, tmp_path / "b", tokenizer=tokenizer)
    truncate(source / "tokenizer.json", 0.5)
    refused(ValueError, "The tokenizer in .* cannot be read", source, tmp_path / "b")


def test_weights_of_a_wrong_dtype(tmp_path):
    model = tiny("Bert")
    model.pooler.dense.weight = nn.Parameter(model.pooler.dense.weight.to(torch.float8_e4m3fn), requires_grad=False)
    refused(ValueError, r"weights of torch.float8_e4m3fn; expected is one of", model, tmp_path / "b", tokenizer=False)
    with torch.device("meta"):
        model = BertModel(BertConfig())
    refused(ValueError, "on the meta device", model, tmp_path / "b", tokenizer=False)


# --- nothing half done ---


def listing(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_existing_destination_is_replaced_only_if_asked_and_a_model(source, tmp_path):
    destination = tmp_path / "b"
    convert_checkpoint(source, destination, NEW)
    first = listing(destination)
    refused(FileExistsError, "exists. Give another destination, or .*--overwrite", source, destination, max_length=99)
    assert listing(destination) == first
    (destination / "stale").write_text("")
    convert_checkpoint(source, destination, 99, overwrite=True)
    assert not (destination / "stale").exists()
    assert AutoModel.from_pretrained(destination).config.max_position_embeddings == 99
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_model_is_never_overwritten(kind, source, tmp_path):
    destination = tmp_path / "b"
    if kind == "folder":
        destination.mkdir()
    (destination if kind == "file" else destination / "thesis.txt").write_text("years of work")
    refused(FileExistsError, "not the folder of a model", source, destination, overwrite=True)


def test_the_source_is_never_overwritten(source, tmp_path):
    refused(ValueError, "The source lies in the destination", source, source, overwrite=True)
    (tmp_path / "config.json").write_text("{}")
    refused(ValueError, "The source lies in the destination", source, tmp_path, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt(), RuntimeError("broken")], ids=repr
)
@pytest.mark.parametrize("when", ["save_pretrained", "from_pretrained"])
def test_a_failure_while_writing_leaves_everything_as_it_was(error, when, overwrite, source, tmp_path, monkeypatch):
    destination = tmp_path / "b"
    if overwrite:
        convert_checkpoint(source, destination, NEW)
    before = listing(tmp_path)
    model, tokenizer = AutoModel.from_pretrained(source), make_tokenizer()
    original = getattr(BertModel, when)

    def fail(*args, **kwargs):
        if when == "save_pretrained":
            original(*args, **kwargs)
        raise error

    monkeypatch.setattr(BertModel, when, fail)
    with pytest.raises(type(error), match=None if not str(error) else r"No space left|broken"):
        convert_checkpoint(model, destination, 99, tokenizer=tokenizer, overwrite=overwrite)
    assert listing(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["a", "b"] if overwrite else ["a"])


@pytest.mark.parametrize("error", [PermissionError(errno.EPERM, "not allowed"), KeyboardInterrupt()], ids=repr)
def test_a_move_that_fails_puts_the_old_model_back(error, source, tmp_path, monkeypatch):
    convert_checkpoint(source, tmp_path / "b", NEW)
    before = listing(tmp_path)
    original = checkpoint.Path.rename

    def rename(self, target):
        if self.suffix == ".partial":
            raise error
        return original(self, target)

    monkeypatch.setattr(checkpoint.Path, "rename", rename)
    message = r"could not be written and is as it was: .*not allowed" if str(error) else None
    with pytest.raises(KeyboardInterrupt if message is None else OSError, match=message):
        convert_checkpoint(source, tmp_path / "b", 99, overwrite=True)
    assert listing(tmp_path) == before


def test_an_old_model_that_cannot_be_deleted_does_not_make_it_a_failure(source, tmp_path, monkeypatch):
    convert_checkpoint(source, tmp_path / "b", NEW)
    original = checkpoint.shutil.rmtree

    def rmtree(path, ignore_errors=False):
        if path.suffix != ".old":
            original(path, ignore_errors)
        elif not ignore_errors:
            raise PermissionError(errno.EPERM, "not allowed")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    convert_checkpoint(source, tmp_path / "b", 99, overwrite=True)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["max_position_embeddings"] == 99


def test_the_home_folder(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert_checkpoint("~/a", "~/b", NEW).source == "a"
    refused(ValueError, "revision='v9' is for a source on the Hub; got 'a'", "~/a", tmp_path / "c", revision="v9")


def test_what_does_not_read_back_is_not_delivered(source, tmp_path, monkeypatch):
    original = BertModel.save_pretrained

    def save(self, folder, **kwargs):
        original(self, folder, **kwargs)
        weights = checkpoint.Path(folder) / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 0x40  # a bit flips on its way to the disk
        weights.write_bytes(content)

    monkeypatch.setattr(BertModel, "save_pretrained", save)
    with pytest.raises(OSError, match="what was read back differs in "):
        convert_checkpoint(source, tmp_path / "b", NEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


PROGRAM = """
    import resource, signal, sys
    from hf_skein.convert import convert_checkpoint, checkpoint
    from transformers import BertModel
    if sys.argv[3] == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    else:
        original = BertModel.save_pretrained
        def save(self, folder):
            original(self, folder)
            print("saving", flush=True)
            signal.pause()
        BertModel.save_pretrained = save
    convert_checkpoint(sys.argv[1], sys.argv[2], 99)
"""


def start(source, destination, how):
    arguments = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(source), str(destination), how]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_file_system_that_takes_no_more(source, tmp_path):
    program = start(source, tmp_path / "b", "full")
    _, stderr = program.communicate(timeout=120)
    assert program.returncode == 1 and "could not be written and is as it was" in stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_killed_conversion_leaves_no_destination(source, tmp_path):
    program = start(source, tmp_path / "b", "kill")
    assert program.stdout.readline() == "saving\n"
    program.send_signal(signal.SIGKILL)
    program.communicate(timeout=120)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[0].startswith(".b.") and left[0].endswith(".partial") and left[1:] == ["a"]
    convert_checkpoint(source, tmp_path / "b", NEW, settings=SKETCH)  # what is left is in nobody's way
    check(AutoModel.from_pretrained(source).eval(), tmp_path / "b", AutoModel)
    shutil.rmtree(tmp_path / left[0])
