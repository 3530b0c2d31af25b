"""Every text encoder of the installed Transformers that calls the attention registry, as a tiny random model."""

import functools
import inspect
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import hf_skein
from hf_skein import registration
from hf_skein.sketch.routing import ROUTING_COMPONENTS


# What is found, but is no text encoder that takes token ids alone, and why.
EXCLUDED = {
    **dict.fromkeys(("gpt2", "gpt-sw3", "imagegpt", "evolla"), "a decoder (test_registration.py has GPT-2 and Llama)"),
    **dict.fromkeys(
        (
            "align",
            "altclip",
            "audioflamingo3",
            "blip_2_qformer",
            "bridgetower",
            "chinese_clip",
            "clap",
            "clvp",
            "dia",
            "fun_asr_nano",
            "gemma4",
            "gemma4_vision",
            "idefics2",
            "idefics3",
            "idefics3_vision",
            "molmo2",
            "molmo2_text",
            "musicgen",
            "nemo_speechlm",
            "paddleocr_vl",
            "pe_audio",
            "pe_audio_video",
            "pe_video",
            "phi4_multimodal",
            "qwen2_audio",
            "seamless_m4t",
            "seamless_m4t_v2",
            "siglip",
            "siglip2",
            "smolvlm",
            "smolvlm_vision",
            "udop",
            "embedding_gemma2",
            "dots3_note",
            "t5gemma2",
            "t5gemma2_encoder",
            "neomme",
            "tipsv2",
        ),
        "multimodal: needs pictures or sound, or is made of a text model that is tested",
    ),
    **dict.fromkeys(("dots3_note_text", "gemma4_text"), "a causal language model with a bidirectional mode"),
    **dict.fromkeys(("bigbird_pegasus", "pegasus_x"), "the encoder has an attention of its own; a warning says so"),
}

SIZES = {  # heads of 24, so that routing has directions to leave out
    **dict.fromkeys(("hidden_size", "d_model", "dim", "embedding_size"), 48),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_decoder_layers",), 1),
    **dict.fromkeys(("num_attention_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_heads",), 2),
    **dict.fromkeys(("num_key_value_heads",), 1),
    **dict.fromkeys(("head_dim", "d_kv"), 24),
    **dict.fromkeys(("vocab_size",), 99),
    **dict.fromkeys(("max_position_embeddings", "max_source_positions"), 128),
    **dict.fromkeys(("pad_token_id",), 1),
    **dict.fromkeys(("bos_token_id", "cls_token_id"), 2),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 3),
}
OVERRIDES = {
    "xmod": {"default_language": "en_XX"},
    "esmc": {"num_key_value_heads": 2},
    "roc_bert": {"pronunciation_vocab_size": 99, "shape_vocab_size": 99},
    "longt5": {"encoder_attention_type": "transient-global"},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
}
_GEMMA = {
    name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
_GEMMA |= {name: SIZES[name] for name in ("num_key_value_heads", "head_dim", "vocab_size")}
OVERRIDES["t5gemma"] = {"encoder": _GEMMA, "decoder": {**_GEMMA, "cross_attention_hidden_size": 48}}
# The reason why no layer is sketched.
POSITION_BIAS = ("t5", "umt5", "mt5", "longt5", "switch_transformers")
ALL_EXACT = {"t5gemma": "soft-capped", **dict.fromkeys(POSITION_BIAS, "position bias")}
SKETCH = {"num_strata": 2, "num_columns": 8, "block_size": 8, "min_length": 0}


def discovered() -> list[str]:
    """Model types that take token ids, build bidirectional masks and ask the registry."""
    found = []
    for model_type, names in MODEL_MAPPING_NAMES.items():
        name = names if isinstance(names, str) else names[0]
        module = model_type_to_module_name(model_type)
        folder = Path(transformers.__file__).parent / "models" / module
        sources = [file.read_text(encoding="utf-8") for file in folder.glob("modeling_*.py")]
        source = next((source for source in sources if f"class {name}(" in source), "")
        if "get_interface(" not in source or "create_bidirectional_mask(" not in source or "input_ids" not in source:
            continue
        try:
            model_class = getattr(transformers, name)
        except ModuleNotFoundError:  # some vision models need torchvision
            continue
        if model_class.main_input_name == "input_ids":
            found.append(model_type)
    return found


TYPES = [t for t in discovered() if t not in EXCLUDED]


def tiny_config(model_type: str):
    default = AutoConfig.for_model(model_type)
    known = inspect.signature(type(default).__init__).parameters
    sizes = {name: value for name, value in SIZES.items() if name in known or hasattr(default, name)}
    return AutoConfig.for_model(model_type, **{**sizes, **OVERRIDES.get(model_type, {})})


def exact_model(model_type: str):
    """A tiny model with sdpa, or with eager attention where the class has no sdpa."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    try:
        model = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    except ValueError as error:
        assert "scaled_dot_product_attention" in str(error)
        model = AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # the usual initialisation is so small that attention would hardly matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1 if model_type == "mobilebert" else 0.2)  # it has no layer norm
    return model


def inputs_for(model):
    ids = torch.randint(5, 99, (2, 60))
    mask = torch.ones_like(ids)
    mask[1, 41:] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :12]
    return inputs


def hidden(model, inputs):
    """Every token's hidden state: `[tokens, hidden]` of the valid ones (of the decoder's, if there is a decoder)."""
    output = model(**inputs)
    if model.config.is_encoder_decoder:
        return torch.cat(
            [output.last_hidden_state.flatten(0, 1), output.encoder_last_hidden_state[inputs["attention_mask"].bool()]]
        )
    return output.last_hidden_state[inputs["attention_mask"].bool()]


def full_layers(model) -> int:
    """Bidirectional layers without a window, read off the configuration."""
    config = model.config
    types = getattr(config, "layer_types", None)
    if types is not None and not config.is_encoder_decoder:
        return sum(t == "full_attention" for t in types)
    for name in ("encoder_layers", "num_hidden_layers", "n_layers", "num_layers"):
        if hasattr(config, name):
            return getattr(config, name)
    raise AssertionError(f"no number of layers in {type(config).__name__}")


def gradients(model, inputs):
    model.zero_grad()
    hidden(model, inputs).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_families_of_the_design_are_among_them():
    known = "albert bart bert bert-generation camembert data2vec-text distilbert electra ernie esm eurobert mbart"
    known += " mobilebert pegasus roberta roberta-prelayernorm roc_bert xlm-roberta xlm-roberta-xl"
    if "ultrabert" in CONFIG_MAPPING_NAMES:
        known += " gte jina_embeddings_v3 modernbert nomic_bert ultrabert t5 umt5 longt5"
    assert set(known.split()) <= set(TYPES)


@pytest.mark.parametrize("model_type", TYPES)
def test_family(model_type, monkeypatch):
    calls, reasons = [], []

    def counted(query, *args, **kwargs):
        calls.append(kwargs.get("layer"))
        assert query.shape[-1] > ROUTING_COMPONENTS
        return hf_skein.attention.skein_attention(query, *args, **kwargs)

    def why(*args):
        reasons.append(original_why(*args))
        return reasons[-1]

    original_why = registration._why_exact
    monkeypatch.setattr(registration, "skein_attention", counted)
    monkeypatch.setattr(registration, "_why_exact", why)

    model = exact_model(model_type)
    inputs = inputs_for(model)
    expected = hidden(model, inputs)
    expected_gradients = gradients(model, inputs)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.set_attn_implementation("skein")
    assert model.config._attn_implementation == "skein"
    below = hidden(model, inputs)
    torch.testing.assert_close(below, expected, rtol=1e-5, atol=1e-5)
    assert reasons

    hf_skein.configure(model, **SKETCH)
    calls.clear(), reasons.clear()
    above = hidden(model, inputs)
    assert above.shape == expected.shape and above.isfinite().all()
    if model_type in ALL_EXACT:
        assert not calls
        assert any(ALL_EXACT[model_type] in (reason or "") for reason in reasons)
        torch.testing.assert_close(above, expected, rtol=1e-5, atol=1e-5)
    else:
        assert len(calls) == full_layers(model)
        assert (above - expected).abs().max() > 1e-4
    found = gradients(model, inputs)
    assert set(found) == set(expected_gradients)
    assert all(gradient.isfinite().all() for gradient in found.values())
    for name, gradient in expected_gradients.items():
        assert gradient.abs().max() < 1e-6 or found[name].abs().max() > 0, name

    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    assert torch.equal(hidden(model, inputs), expected)


@functools.cache
def refused_types() -> tuple[str, ...]:
    names = "big_bird led rembert megatron-bert mpnet luke roformer deberta deberta-v2 canine convbert ibert"
    names += " squeezebert nystromformer yoso fnet"
    return tuple(name for name in names.split() if name in MODEL_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", refused_types())
def test_a_class_that_never_calls_the_registry_is_refused_at_load(model_type, tmp_path):
    config = tiny_config(model_type)
    with pytest.raises(ValueError, match="never asks Transformers' attention registry"):
        AutoModel.from_config(config, attn_implementation="skein")
    if model_type == "mpnet":
        AutoModel.from_config(tiny_config(model_type)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"MPNetModel.*MPNetSelfAttention"):
            AutoModel.from_pretrained(tmp_path, attn_implementation="skein")


DELEGATING = "dpr fuyu llava llava_onevision mistral3 modernvbert paligemma"


@pytest.mark.parametrize("model_type", [name for name in DELEGATING.split() if name in MODEL_MAPPING_NAMES])
def test_a_model_that_leaves_attention_to_others_that_ask_is_accepted(model_type):
    config = AutoConfig.for_model(model_type)
    for part in registration._all_configs(config, config):
        if hasattr(part, "num_hidden_layers"):
            part.num_hidden_layers = 2
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="skein")
    assert not registration.calls_registry(type(model))


def test_a_model_that_does_not_tell_those_it_leaves_attention_to_is_refused():
    parts = {name: tiny_config(name) for name in ("dpr", "bart")}
    config = transformers.RagConfig.from_question_encoder_generator_configs(*parts.values())
    with pytest.raises(ValueError, match="RagModel does not support"):
        transformers.RagModel._from_config(config, attn_implementation="skein")
    model = transformers.RagModel._from_config(config, attn_implementation="sdpa")
    model.set_attn_implementation("skein")
    assert {m.config._attn_implementation for m in model.generator.modules() if hasattr(m, "config")} == {"skein"}
