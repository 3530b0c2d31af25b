"""Longformer's own classes with attn_implementation="skein", and Longformer's settings and inputs on other encoders."""

import copy
import pickle

import pytest
import torch
from test_attention import error
from test_registration import TINY, bert, build, token_ids
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    EncoderDecoderConfig,
    LongformerConfig,
    LongformerModel,
    ModernBertConfig,
    RobertaConfig,
)
from transformers.models.longformer import modeling_longformer

import hf_skein
from hf_skein import longformer, registration


WINDOW = 128  # each token sees 64 to either side
HEADS = (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMultipleChoice,
)
SKETCH = {"num_columns": 8, "num_strata": 4, "block_size": 16, "min_length": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def config(window=WINDOW, **fields):
    return LongformerConfig(**{**TINY, "pad_token_id": 1, "sep_token_id": 2}, attention_window=window, **fields)


def pair(tmp_path, auto=AutoModel, sketch=None, window=WINDOW, **fields):
    """The same weights with the window and with skein."""
    windowed = build(config(window, **fields), None, auto, sketch=None)
    windowed.save_pretrained(tmp_path)
    sketched = auto.from_pretrained(tmp_path, attn_implementation="skein").eval()
    if sketch is not None:
        hf_skein.configure(sketched, **sketch)
    return windowed, sketched


def batch(n=60):
    inputs = {"input_ids": token_ids(n), "attention_mask": torch.ones(2, n, dtype=torch.long)}
    inputs["input_ids"][1, -13:], inputs["attention_mask"][1, -13:] = 1, 0
    inputs["global_attention_mask"] = torch.zeros(2, n, dtype=torch.long)
    inputs["global_attention_mask"][0, [0, 7]] = inputs["global_attention_mask"][1, 3] = 1
    return inputs


@pytest.mark.parametrize("auto", HEADS)
def test_within_the_window_it_is_the_same_model(auto, tmp_path):
    windowed, sketched = pair(tmp_path, auto)
    assert type(sketched) is type(windowed)
    assert list(sketched.state_dict()) == list(windowed.state_dict())
    inputs = batch()
    if auto is AutoModelForMultipleChoice:
        inputs = {name: x[:, None].repeat(1, 2, 1) for name, x in inputs.items()}
    for one in (inputs, {**inputs, "global_attention_mask": torch.zeros_like(inputs["input_ids"])}):
        expected, output = windowed(**one), sketched(**one)
        for name, value in output.items():
            if name in ("last_hidden_state", "logits", "start_logits", "end_logits") and value.shape[1:2] == (60,):
                valid = one["attention_mask"].bool()
                assert error(value[valid], expected[name][valid]) < 1e-5
            else:
                assert error(value, expected[name]) < 1e-5


def test_gradients_are_the_same_within_the_window(tmp_path):
    gradients, inputs = [], {name: x[:1] for name, x in batch().items()}
    for model in pair(tmp_path, **NO_DROPOUT):
        model.double().train()(**inputs).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert set(found) == set(expected) and any("query_global" in name for name in found)
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():  # of a key's bias the gradient is zero but for rounding
        assert (found[name] - gradient).norm() < 1e-5 * max(gradient.norm(), 1e-2 * largest), name


def test_beyond_the_window_global_rows_are_exact_through_their_own_projections(tmp_path, monkeypatch):
    windowed, sketched = pair(tmp_path, sketch=SKETCH, window=4)
    counts = []
    original = longformer.skein_attention

    def counted(query, *args, **kwargs):
        counts.append((query.shape[2], kwargs["layer"], kwargs["config"].num_columns))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(longformer, "skein_attention", counted)
    hidden = torch.randn(2, 60, 32)
    inputs = batch()
    masks = {
        "is_index_masked": inputs["attention_mask"] == 0,
        "is_index_global_attn": inputs["global_attention_mask"] == 1,
        "is_global_attn": True,
    }
    additive = torch.zeros(2, 60).masked_fill(masks["is_index_masked"], -1e4)
    additive = additive.masked_fill(masks["is_index_global_attn"], 1e4)
    (expected,) = windowed.encoder.layer[1].attention.self(hidden, additive, **masks)
    (output,) = sketched.encoder.layer[1].attention.self(hidden, additive, **masks)
    is_global, valid = masks["is_index_global_attn"], ~masks["is_index_masked"]
    assert error(output[is_global], expected[is_global]) < 1e-5
    assert error(output[valid], expected[valid]) > 0.05  # the others no longer see a window
    counts.clear()
    sketched(**{**inputs, **{name: x[:, :59] for name, x in inputs.items()}})
    assert counts == [(59, layer, 8) for layer in range(3)]  # 59 is not padded to the window


def test_other_models_keep_their_window(tmp_path):
    windowed, sketched = pair(tmp_path)
    kinds = [type(model.encoder.layer[0].attention.self) for model in (windowed, sketched)]
    assert kinds == [modeling_longformer.LongformerSelfAttention, longformer.LongformerSelfAttention]
    assert kinds[0].__name__ == kinds[1].__name__  # device_map asks for the name
    assert "_pad_to_window_size" not in vars(windowed)
    assert LongformerModel(config())._pad_to_window_size.__func__ is LongformerModel._pad_to_window_size


def test_as_a_part_of_another_model():
    for attention, expected in (("skein", longformer), ({"decoder": "skein"}, modeling_longformer)):
        parts = EncoderDecoderConfig.from_encoder_decoder_configs(config(), BertConfig(**TINY))
        model = AutoModelForSeq2SeqLM.from_config(parts, attn_implementation=attention)
        assert type(model.encoder.encoder.layer[0].attention.self) is expected.LongformerSelfAttention


def test_it_can_be_saved_copied_and_pickled(tmp_path):
    _, sketched = pair(tmp_path, sketch=SKETCH)
    inputs = batch()
    expected = sketched(**inputs).last_hidden_state
    for other in (copy.deepcopy(sketched), pickle.loads(pickle.dumps(sketched))):
        assert torch.equal(other(**inputs).last_hidden_state, expected)
    sketched.save_pretrained(tmp_path / "again")
    again, info = AutoModel.from_pretrained(tmp_path / "again", attn_implementation="skein", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again.eval()(**inputs).last_hidden_state, expected)


def test_training_with_checkpointing_and_dropout_runs(tmp_path):
    _, sketched = pair(tmp_path, sketch=SKETCH)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            sketched.gradient_checkpointing_enable()
        sketched.train().zero_grad()
        torch.manual_seed(0)
        sketched(**batch()).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in sketched.parameters() if p.grad is not None])
    assert len(gradients[0]) > 40
    for first, second in zip(*gradients, strict=True):
        assert first.isfinite().all()
        torch.testing.assert_close(first, second)


def test_attention_weights_are_refused(tmp_path):
    _, sketched = pair(tmp_path)
    with pytest.raises(ValueError, match=r"a sketch has no attention weights.*Load the model without"):
        sketched(**batch(), output_attentions=True)


# --- Longformer's settings and inputs on other encoders ---


def test_the_window_says_how_many_columns_where_nothing_else_does():
    def settings(window, **fields):
        return registration._skein_config(BertConfig(**TINY, attention_window=window, **fields))

    assert settings(64) == settings([64, 64, 64]) == hf_skein.SkeinConfig(num_columns=64)
    assert [settings([64, 32, 64]).for_layer(layer).num_columns for layer in range(3)] == [64, 32, 64]
    assert settings(64, skein={"num_columns": 16}).num_columns == 16
    assert settings(64, skein={"min_length": 0}) == hf_skein.SkeinConfig(num_columns=64, min_length=0)
    assert registration._skein_config(config(48)).num_columns == 48
    with pytest.raises(ValueError, match=r"num_columns is -2"):
        settings(-2)


def test_windows_of_layers_stay_until_columns_are_set():
    def columns(config):
        return [registration._skein_config(config).for_layer(layer).num_columns for layer in range(3)]

    config = BertConfig(**TINY, attention_window=[64, 32, 48])
    hf_skein.configure(config, min_length=0)
    hf_skein.configure(config, layers={1: {"method": "exact"}, 2: {"num_columns": 7}})
    assert columns(config) == [64, 32, 7]
    assert registration._skein_config(config).for_layer(1).method == "exact"
    hf_skein.configure(config, layers={0: {"exact_rows": 2}})
    assert columns(config) == [64, 32, 48]
    hf_skein.configure(config, num_columns=256)
    assert columns(config) == [256, 256, 256]
    assert registration._skein_config(config).layers == {0: {"exact_rows": 2}}
    hf_skein.configure(config, layers={1: {"num_columns": 9}})
    assert columns(config) == [256, 9, 256]
    with pytest.raises(ValueError, match="allowed is a dict"):
        hf_skein.configure(BertConfig(**TINY, attention_window=[64, 32, 48]), layers={0: 3})


@pytest.mark.parametrize("config_class", [BertConfig, RobertaConfig])
@pytest.mark.parametrize("auto", HEADS)
def test_global_attention_mask_reaches_the_sketch(auto, config_class, monkeypatch):
    seen = []
    original = registration.skein_attention

    def spy(*args, **kwargs):
        seen.append(kwargs["global_mask"])
        return original(*args, **kwargs)

    monkeypatch.setattr(registration, "skein_attention", spy)
    model = build(
        config_class(**TINY, attention_window=8), "skein", auto, {"num_strata": 2, "block_size": 8, "min_length": 0}
    )
    assert model.config.skein["num_columns"] == 8
    inputs = batch()
    plain = {name: x for name, x in inputs.items() if name != "global_attention_mask"}
    if auto is AutoModelForMultipleChoice:
        inputs, plain = ({name: x[:, None] for name, x in one.items()} for one in (inputs, plain))
    output = model(**inputs)
    assert [mask.tolist() for mask in seen] == [batch()["global_attention_mask"].tolist()] * 3
    without = model(**plain)
    name = next(iter(output))
    assert error(output[name], without[name]) > 1e-6
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**inputs)[name], model(**plain)[name])  # exact attention: every token is global


def test_global_attention_mask_and_a_sliding_window_raise():
    model = build(ModernBertConfig(**{**TINY, "cls_token_id": 1, "sep_token_id": 2}, local_attention=16))
    with pytest.raises(ValueError, match="global_attention_mask would be ignored"):
        model(**batch())


def test_global_attention_mask_has_no_effect_below_the_exact_length():
    model = bert(sketch={"min_length": 60})
    inputs = batch()
    plain = {name: x for name, x in inputs.items() if name != "global_attention_mask"}
    assert torch.equal(model(**inputs).last_hidden_state, model(**plain).last_hidden_state)
