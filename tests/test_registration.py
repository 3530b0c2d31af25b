"""Skein inside Transformers: registration, saving, what cannot be sketched, and the promises on whole models."""

import inspect
import json
import logging
import subprocess
import sys

import pytest
import torch
from test_attention import error
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    BertTokenizer,
    EncoderDecoderConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedModel,
    T5Model,
    pipeline,
)
from transformers.masking_utils import create_bidirectional_mask

import hf_skein
from hf_skein import registration
from hf_skein.local import band_mask, local_attention


SKETCH = {"num_columns": 8, "block_size": 8, "min_length": 0}
TINY = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
TINY |= {"max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(config, attn="skein", auto=AutoModel, sketch=SKETCH):
    """A tiny random model whose attention matters."""
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=attn).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    if sketch is not None:
        hf_skein.configure(model, **sketch)
    return model


def bert(attn="skein", auto=AutoModel, sketch=SKETCH, **fields):
    return build(BertConfig(**TINY, **fields), attn, auto, sketch)


def token_ids(n=60, batch=2):
    return torch.randint(3, 99, (batch, n))


@pytest.fixture
def log(caplog):
    """Log records of this test: the reason is logged once per process, so what was logged is forgotten first."""
    registration._log_exact.cache_clear()
    registration._check_class.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.fixture
def sketched(monkeypatch):
    """Layers that were really sketched."""
    layers = []
    original = registration.skein_attention

    def counted(*args, **kwargs):
        layers.append(kwargs["layer"])
        return original(*args, **kwargs)

    monkeypatch.setattr(registration, "skein_attention", counted)
    return layers


# --- registration ---


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light_and_needs_no_extras():
    blocked = "['triton', 'accelerate', 'datasets', 'evaluate', 'peft', 'sklearn', 'matplotlib', 'psutil']"
    output = run_python(
        f"""
import sys, time
for name in {blocked}:
    sys.modules[name] = None
import transformers
before = set(sys.modules)
start = time.perf_counter()
import hf_skein
seconds = time.perf_counter() - start
assert "transformers.modeling_utils" in before or "transformers.modeling_utils" not in sys.modules
from transformers import AttentionInterface, AttentionMaskInterface
assert "skein" in AttentionInterface() and "skein" in AttentionMaskInterface()
import torch
q = torch.randn(1, 2, 600, 16)
assert hf_skein.skein_attention(q, q, q).shape == q.shape
print(seconds)
"""
    )
    assert float(output) < 0.3


def test_looking_for_transformers_without_importing_it_does_not_use_up_the_hook():
    code = """
import importlib.util
import hf_skein
importlib.util.find_spec("transformers.modeling_utils")
from transformers import AttentionInterface
print("skein" in AttentionInterface())
"""
    assert run_python(code).strip() == "True"


def test_both_interfaces_are_registered():
    assert AttentionInterface()["skein"] is registration.skein_attention_forward
    assert AttentionMaskInterface()["skein"] is registration.skein_mask
    registration.register()  # again is no error


@pytest.mark.parametrize("interface", [AttentionInterface, AttentionMaskInterface])
def test_registering_over_somebody_elses_entry_raises(interface, monkeypatch):
    monkeypatch.setitem(interface._global_mapping, "skein", print)
    with pytest.raises(ValueError, match=r"already has an entry 'skein' \(builtins.print\)"):
        registration.register()
    assert interface._global_mapping["skein"] is print


def test_switching_there_and_back(sketched):
    model = bert("sdpa")
    ids = token_ids(700)
    exact = model(ids).last_hidden_state
    model.set_attn_implementation("skein")
    assert not torch.allclose(model(ids).last_hidden_state, exact, atol=1e-3)
    assert sketched == [0, 1, 2]
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids).last_hidden_state, exact)


HEADS = (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMultipleChoice,
)


@pytest.mark.parametrize("auto", HEADS)
def test_every_head_loads_from_disk_and_is_sketched(auto, tmp_path, sketched):
    model = bert("sdpa", auto, sketch=None)
    keys = list(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, attn_implementation="skein", output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model) and list(loaded.state_dict()) == keys
    ids = token_ids(600)
    inputs = ids[:, None] if auto is AutoModelForMultipleChoice else ids
    output = loaded(inputs)
    assert sketched == [0, 1, 2]
    assert all(x.isfinite().all() for x in output.values())


def test_pipeline(tmp_path, sketched):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=2048).save_pretrained(tmp_path)
    bert(auto=AutoModelForSequenceClassification, sketch=None).save_pretrained(tmp_path)
    classify = pipeline("text-classification", str(tmp_path), model_kwargs={"attn_implementation": "skein"})
    result = classify("a b c d e f g h " * 100)
    assert 0 <= result[0]["score"] <= 1
    assert sketched == [0, 1, 2]


# --- configuration ---


def test_configure_is_saved_as_json_and_restored(tmp_path):
    model = bert(sketch={"num_columns": 24, "layers": {1: {"method": "exact"}}})
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["skein"]["num_columns"] == 24 and saved["skein"]["layers"] == {"1": {"method": "exact"}}
    assert not [key for key in saved if "attn_implementation" in key]
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="skein")
    assert loaded.config.skein == model.config.skein
    ids = token_ids()
    assert torch.equal(loaded.eval()(ids).last_hidden_state, model(ids).last_hidden_state)
    exact = AutoModel.from_pretrained(tmp_path)
    assert exact.config._attn_implementation == "sdpa"


def test_configure_keeps_what_it_is_not_given_and_checks_before_it_changes():
    config = BertConfig(**TINY)
    assert hf_skein.configure(config, num_columns=24) == hf_skein.SkeinConfig(num_columns=24)
    hf_skein.configure(config, block_size=32)
    before = dict(config.skein)
    assert (before["num_columns"], before["block_size"]) == (24, 32)
    for wrong in ({"num_column": 3}, {"num_columns": 0}, {"layers": {0: {"method": "no"}}}):
        with pytest.raises(ValueError, match=r"column|method"):
            hf_skein.configure(config, **wrong)
    assert config.skein == before
    with pytest.raises(ValueError, match="expects a model"):
        hf_skein.configure(torch.nn.Linear(1, 1))


def test_an_assigned_skein_config_becomes_json(tmp_path, sketched):
    settings = hf_skein.SkeinConfig(**SKETCH, layers={1: {"method": "exact"}})
    config = BertConfig(**TINY, skein=settings)
    model = build(config, sketch=None)
    assert model.config.skein == settings.to_dict()  # seen at load
    model.config.skein = settings
    model(token_ids())
    assert sketched == [0, 2] and model.config.skein == settings.to_dict()  # seen by attention
    model.config.skein = settings
    hf_skein.configure(model, seed=3)
    assert model.config.skein == {**settings.to_dict(), "seed": 3}  # seen by configure
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).skein == model.config.skein


@pytest.mark.parametrize("wrong", [{"layers": {0: hf_skein.SkeinConfig()}}, {"num_columns": torch.tensor(3)}, {3, 4}])
def test_settings_that_are_no_json_are_refused_with_the_way_to_set_them(wrong):
    config = BertConfig(**TINY, skein=wrong)
    with pytest.raises(ValueError, match=r"not plain JSON .* hf_skein\.configure\(.*\.to_dict\(\)"):
        build(config, sketch=None)
    with pytest.raises(ValueError, match=r"hf_skein\.configure"):
        hf_skein.configure(config, seed=3)


def test_configure_keeps_what_a_nested_model_was_given():
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**TINY), BertConfig(**TINY))
    hf_skein.configure(config.encoder, num_columns=24)
    hf_skein.configure(config, seed=3)
    assert (config.encoder.skein["num_columns"], config.encoder.skein["seed"]) == (24, 3)
    assert (config.decoder.skein["num_columns"], config.decoder.skein["seed"]) == (
        hf_skein.SkeinConfig().num_columns,
        3,
    )


def test_layers_have_their_own_settings(sketched):
    model = bert(sketch={**SKETCH, "layers": {0: {"method": "exact"}, 2: {"num_columns": 60}}})
    exact = bert("sdpa", sketch=None)
    ids = token_ids()
    assert torch.equal(
        model(ids, output_hidden_states=True).hidden_states[1], exact(ids, output_hidden_states=True).hidden_states[1]
    )
    assert sketched == [1, 2]


def test_layers_of_a_model_that_does_not_number_them_raise():
    model = build(AutoConfig.for_model("distilbert", vocab_size=99, dim=32, n_heads=2, n_layers=2, hidden_dim=48))
    hf_skein.configure(model, layers={0: {"method": "exact"}})
    with pytest.raises(ValueError, match="layer_idx"):
        model(token_ids())


# --- what cannot be sketched runs exactly, says so once, and raises when strict ---


def bert_decoder():
    return BertConfig(**TINY, is_decoder=True), {"input_ids": token_ids()}, "causal|decoder"


def gpt2():
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=2)
    return config, {"input_ids": token_ids()}, "causal"


def llama():
    return LlamaConfig(**TINY, num_key_value_heads=1), {"input_ids": token_ids()}, "causal"


def padded_llama():
    config, inputs, _ = llama()
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :20] = 0
    return config, {**inputs, "attention_mask": mask}, "causal"


def bart_decoder():
    config = BartConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    hf_skein.configure(config, layers={0: {"method": "exact"}, 1: {"method": "exact"}})  # the encoder's layers
    return config, {"input_ids": token_ids(), "decoder_input_ids": token_ids(20)}, None


def sliding_window():
    config = ModernBertConfig(
        **{**TINY, "cls_token_id": 1, "sep_token_id": 2}, local_attention=16, global_attn_every_n_layers=2
    )
    return config, {"input_ids": token_ids()}, "sliding window"


def position_bias():
    config = AutoConfig.for_model("t5", vocab_size=99, d_model=32, num_layers=2, num_heads=2, d_ff=48, d_kv=16)
    return config, {"input_ids": token_ids(), "decoder_input_ids": token_ids(20)}, "position bias"


def four_dimensional_mask():
    mask = torch.ones(2, 1, 60, 60, dtype=torch.bool).tril(20)
    return BertConfig(**TINY), {"input_ids": token_ids(), "attention_mask": mask}, "4D attention mask"


def packed_documents():
    positions = torch.cat([torch.arange(35), torch.arange(25)])[None].expand(2, -1)
    config = AutoConfig.for_model("eurobert", **TINY, num_key_value_heads=1)
    return config, {"input_ids": token_ids(), "position_ids": positions}, "packed documents"


def output_attentions():
    return BertConfig(**TINY), {"input_ids": token_ids(), "output_attentions": True}, "output_attentions"


CASES = (
    bert_decoder, gpt2, llama, padded_llama, sliding_window, position_bias, four_dimensional_mask, packed_documents,
    output_attentions,
)  # fmt: skip


if not registration.calls_registry(T5Model):  # in older releases of Transformers T5 is refused at load
    CASES = tuple(case for case in CASES if case is not position_bias)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_cannot_be_sketched_is_exact_and_logged_once(case, log):
    config, inputs, reason = case()
    eager = build(config, "eager", sketch=None)
    model = build(config, sketch=None)
    expected = eager(**inputs)
    hf_skein.configure(model, **SKETCH, **({"layers": {0: {"method": "exact"}}} if case is sliding_window else {}))
    if case is sliding_window:  # its full layers are sketched, so compare the first local one
        expected, output = (m(**inputs, output_hidden_states=True).hidden_states[2] for m in (eager, model))
    else:
        output = model(**inputs)
        if case is output_attentions:
            assert len(output.attentions) == 3
            torch.testing.assert_close(output.attentions, expected.attentions, rtol=1e-4, atol=1e-5)
        expected, output = expected.last_hidden_state, output.last_hidden_state
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    model(**inputs)
    messages = [record.getMessage() for record in log.records if "runs exact attention" in record.getMessage()]
    assert messages and len(messages) == len(set(messages))
    assert any(word in message for message in messages for word in reason.split("|"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_cannot_be_sketched_raises_when_strict(case):
    config, inputs, reason = case()
    model = build(config, sketch={**SKETCH, "strict": True})
    with pytest.raises(ValueError, match=reason):
        model(**inputs)


def test_the_decoder_side_of_bart_is_exact(log, sketched):
    config, inputs, _ = bart_decoder()
    exact = build(config, "sdpa", sketch=None)
    model = build(config, sketch=SKETCH)
    output = model(**inputs)
    assert not sketched  # layers 0 and 1 are exact in the encoder, and the decoder is never sketched
    torch.testing.assert_close(output.last_hidden_state, exact(**inputs).last_hidden_state, rtol=1e-4, atol=1e-5)
    hf_skein.configure(model, layers={})
    model(**inputs)
    assert sketched == [0, 1]
    assert any("BartAttention" in record.getMessage() for record in log.records)
    hf_skein.configure(model, strict=True)
    with pytest.raises(ValueError, match=r"causal|decoder"):
        model(**inputs)


def test_soft_capping_is_exact(log):
    config = AutoConfig.for_model("gemma2", **TINY, num_key_value_heads=1, head_dim=16, attn_logit_softcapping=2.0)
    eager, model = (build(config, attn, sketch=None) for attn in ("eager", "skein"))
    hf_skein.configure(model, **SKETCH)
    ids = token_ids(30)
    torch.testing.assert_close(model(ids).last_hidden_state, eager(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert any("soft-capped" in record.getMessage() for record in log.records)


def test_a_cache_with_more_keys_than_queries_is_exact(log):
    """As in prefix tuning: the layers see keys that no query of this call made."""
    layer = bert().encoder.layer[0].attention.self
    query, (key, value) = torch.randn(1, 2, 40, 16), torch.randn(2, 1, 2, 60, 16)
    output, _ = registration.skein_attention_forward(layer, query, key, value, torch.ones(1, 60, dtype=torch.bool))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    assert error(output, expected) < 1e-6
    assert any("prefix tuning" in record.getMessage() for record in log.records)


def test_exact_attention_does_not_look_into_a_mask_while_a_graph_is_made():
    """A padded batch with fewer queries than keys, as with a cache, under `torch.compile(fullgraph=True)`."""
    module = bert().encoder.layer[0].attention.self
    query, key, value = (torch.randn(2, 2, n, 16) for n in (3, 7, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3], dtype=torch.bool)

    def run(mask):
        return registration._exact(module, query, key, value, mask, 0.0, None, False, {})[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for one in (mask, torch.ones_like(mask)):
        torch.testing.assert_close(compiled(one), run(one))


def test_prefix_tuning_with_peft(log):
    peft = pytest.importorskip("peft")
    settings = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    ids, mask = token_ids(), torch.ones(2, 60, dtype=torch.long)
    mask[1, 45:] = 0
    outputs = []
    for attn in ("eager", "skein"):
        torch.manual_seed(0)
        model = peft.get_peft_model(bert(attn, AutoModelForSequenceClassification), settings).eval()
        outputs.append(model(input_ids=ids, attention_mask=mask).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert any("prefix tuning" in record.getMessage() for record in log.records)


def test_a_4d_mask_that_is_the_same_for_every_query_is_padding_or_a_bias(sketched, log):
    layer = bert().encoder.layer[0].attention.self
    query, key, value = torch.randn(3, 2, 2, 60, 16)
    mask = torch.arange(60) < torch.tensor([[60], [41]])

    def attend(attention_mask):
        return registration.skein_attention_forward(layer, query, key, value, attention_mask)[0]

    expected = attend(mask)
    additive = torch.zeros(2, 1, 1, 60).masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    assert torch.equal(attend(additive), expected) and torch.equal(attend(mask[:, None, None]), expected)
    assert len(sketched) == 3
    bias = additive + torch.randn(60)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)
    assert error(attend(bias), exact) < 1e-6
    assert len(sketched) == 3
    assert any("4D attention mask" in record.getMessage() for record in log.records)


@pytest.mark.parametrize("added", [-1000.0, -999.0])
def test_what_counts_as_padding_is_the_same_with_and_without_transformers(added, sketched, log):
    layer = bert().encoder.layer[0].attention.self
    query, key, value = torch.randn(3, 1, 2, 60, 16)
    mask = torch.zeros(1, 1, 1, 60).masked_fill(torch.arange(60) >= 41, added)
    output, _ = registration.skein_attention_forward(layer, query, key, value, mask)
    if added == -1000:
        expected = hf_skein.skein_attention(query, key, value, mask, config=hf_skein.SkeinConfig(**SKETCH))
        assert torch.equal(output.transpose(1, 2), expected) and sketched
    else:
        with pytest.raises(ValueError, match="-1000 or less for padding"):
            hf_skein.skein_attention(query, key, value, mask)
        assert not sketched


def test_a_module_that_serves_cross_attention_too_is_exact(sketched, log):
    """Equal lengths would not tell its cross-attention from self-attention."""

    class Attention(torch.nn.Module):
        is_causal = False
        config = BertConfig(**TINY)

        def forward(self, hidden_states, key_value_states=None):
            return hidden_states

    hf_skein.configure(Attention.config, **SKETCH)
    query, key, value = torch.randn(3, 2, 2, 60, 16)
    mask = torch.arange(60) < torch.tensor([[60], [41]])
    output, _ = registration.skein_attention_forward(Attention(), query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
    assert error(output, expected.transpose(1, 2)) < 1e-6
    assert not sketched


def test_masks_that_will_be_concatenated_are_4d():
    config = BertConfig(**TINY, attn_implementation="skein")
    arguments = {"config": config, "inputs_embeds": torch.zeros(2, 60, 32), "attention_mask": torch.ones(2, 60).long()}
    assert create_bidirectional_mask(**arguments).shape == (2, 60)
    if "allow_is_bidirectional_skip" in inspect.signature(create_bidirectional_mask).parameters:
        mask = create_bidirectional_mask(**arguments, allow_is_bidirectional_skip=False)
        assert mask.shape == (2, 1, 60, 60)


def test_attentions_of_sliding_windows():
    config = sliding_window()[0]
    ids, mask = token_ids(), torch.ones(2, 60, dtype=torch.long)
    mask[1, 45:] = 0
    outputs = [build(config, attn)(ids, attention_mask=mask, output_attentions=True) for attn in ("eager", "skein")]
    valid = mask.bool()
    for eager, skein in zip(outputs[0].attentions, outputs[1].attentions, strict=True):
        torch.testing.assert_close(eager.transpose(1, 2)[valid], skein.transpose(1, 2)[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "packed"),
    [
        ([0, 1, 2, 3, 1, 1, 1], False),  # padding at the end, by any constant
        ([0, 1, 2, 3, 0, 0, 0], False),
        ([0, 1, 2, 3, 0], False),
        ([2, 3, 4, 5, 1, 1, 1], False),  # RoBERTa's padding_idx
        ([1, 1, 2, 3, 4, 1, 1], False),
        ([1, 1, 1, 2, 3, 4, 5], False),  # padding in front
        ([0, 0, 0, 1, 2, 3, 4], False),
        ([1, 1, 1, 0, 1, 2, 3], False),
        ([0, 1, 2, 0, 0, 3, 4], False),  # padding in between
        ([2, 3, 1, 4, 5, 1, 6], False),
        ([0], False),
        ([0, 1, 2, 0, 1, 2, 3], True),
        ([2, 3, 4, 2, 3, 1, 1], True),
        ([0, 1, 2, 0, 0, 1, 2], True),  # a document of one token between two
        ([0, 1, 2, 1, 1, 0, 1], True),  # padding between documents
    ],
)
def test_padding_is_not_a_packed_document(positions, packed):
    single = list(range(len(positions)))
    for rows in ([positions], [single, positions]):
        assert registration._is_packed({"position_ids": torch.tensor(rows)}) is packed


def test_cu_seq_lens_mean_packed_documents():
    assert registration._is_packed({"cu_seq_lens_q": torch.tensor([0, 3, 7])})


def test_positions_padded_with_zero_are_sketched(sketched):
    ids, mask = token_ids(), torch.ones(2, 60, dtype=torch.long)
    mask[1, 41:] = 0
    positions = (mask.cumsum(-1) - 1) * mask
    config = AutoConfig.for_model("eurobert", **TINY, num_key_value_heads=1)
    model = build(config, sketch={**SKETCH, "strict": True})
    output = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    assert sketched == [0, 1, 2]
    plain = model(ids, attention_mask=mask).last_hidden_state
    valid = mask.bool()
    torch.testing.assert_close(output[valid], plain[valid])


def test_classes_with_a_partly_own_attention_warn(log):
    config = AutoConfig.for_model(
        "bigbird_pegasus", vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    AutoModel.from_config(config, attn_implementation="skein")
    assert any("BigBirdPegasusBlockSparseAttention" in record.getMessage() for record in log.records)


class Foreign(PreTrainedModel):
    """As `TimmWrapperModel`: says that it supports sdpa, and gets its attention from another library."""

    config_class = BertConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.TransformerEncoderLayer(config.hidden_size, config.num_attention_heads)
        self.post_init()


class Wrapper(PreTrainedModel):
    """A file without an attention of its own, around a model of Transformers that does or does not get its settings."""

    config_class = BertConfig
    _supports_sdpa = True

    def __init__(self, config, attn="skein"):
        super().__init__(config)
        self.body = AutoModel.from_config(AutoConfig.for_model("roberta", **TINY), attn_implementation=attn)
        self.post_init()


def test_delegation_to_other_models_is_verified_on_what_was_built(tmp_path):
    config = BertConfig(**TINY, attn_implementation="skein")
    Wrapper(config)
    for build_refused in (lambda: Foreign(config), lambda: Wrapper(config, "sdpa")):
        with pytest.raises(ValueError, match="never asks Transformers' attention registry"):
            build_refused()
    foreign = Foreign(BertConfig(**TINY))
    foreign.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Foreign does not support"):
        Foreign.from_pretrained(tmp_path, attn_implementation="skein")
    with pytest.raises(ValueError, match="Foreign does not support"):
        foreign.set_attn_implementation("skein")
    assert foreign.config._attn_implementation == "sdpa"
    wrapper = Wrapper(BertConfig(**TINY), "sdpa")
    wrapper.set_attn_implementation("skein")
    assert wrapper.body.config._attn_implementation == "skein"


def test_parts_of_a_model_may_be_named():
    def load(attn):
        encoder = AutoConfig.for_model("mpnet", **TINY)
        config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, BertConfig(**TINY))
        return AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attn)

    with pytest.raises(ValueError, match=r"MPNetModel.*name the parts"):
        load("skein")
    model = load({"decoder": "skein"})
    assert model.decoder.config._attn_implementation == "skein"
    assert model.encoder.config._attn_implementation != "skein"


# --- sliding windows ---


@pytest.mark.parametrize(("n", "window"), [(1, 3), (7, 3), (50, 8), (64, 1), (33, 0), (20, 40)])
def test_local_attention_is_masked_attention(n, window, poisoned):
    query, key, value = torch.randn(2, 4, n, 8), torch.randn(2, 2, n, 8), torch.randn(2, 2, n, 6)
    padding = torch.rand(2, n) < 0.8
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    mask = (distance <= window) & padding[:, None, None, :]
    band = band_mask(lambda b, h, q, k: (q - k).abs() <= window, 2, n, window, padding, None)
    assert band.shape == (2, n, 2 * window + 1)
    output = local_attention(query, key, value, band, 0.3)
    logits = (0.3 * query @ key.repeat_interleave(2, 1).mT).masked_fill(~mask, -torch.inf)
    expected = logits.softmax(-1).nan_to_num() @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(output, expected)


class NoSquare(TorchDispatchMode):
    """Fails on any tensor with as many elements as half of n x n."""

    def __init__(self, n):
        super().__init__()
        self.limit = n * n // 2

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                assert x.numel() < self.limit, f"{function} made {tuple(x.shape)}"
        return result


@pytest.mark.parametrize("padded", [False, True])
def test_modernbert_at_32768_tokens_has_no_square_mask(padded, sketched):
    n = 32768
    config = ModernBertConfig(**{**TINY, "cls_token_id": 1, "sep_token_id": 2, "max_position_embeddings": n})
    model = build(config, sketch={"max_blocks": 64})
    mask = torch.ones(1, n, dtype=torch.long)
    mask[0, n - 100 * padded :] = 0
    with torch.no_grad(), NoSquare(n):
        output = model(token_ids(n, 1), attention_mask=mask).last_hidden_state
    assert output.isfinite().all() and sketched == [0]


# --- the promises on whole models ---


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta"])
def test_a_sequence_alone_in_a_batch_or_with_much_padding(family, method):
    if family == "modernbert":
        config = ModernBertConfig(
            **{**TINY, "cls_token_id": 1, "sep_token_id": 2}, local_attention=32, global_attn_every_n_layers=2
        )
    else:
        config = AutoConfig.for_model(family, **TINY)
    model = build(config, sketch={**SKETCH, "num_columns": 32, "block_size": 16, "method": method})
    lengths = (300, 90, 211)
    ids, mask = token_ids(1300, 3), torch.arange(1300) < torch.tensor(lengths)[:, None]
    ids = ids.masked_fill(~mask, 0)
    much = model(ids, attention_mask=mask.long()).last_hidden_state
    little = model(ids[:, :300], attention_mask=mask[:, :300].long()).last_hidden_state
    for i, n in enumerate(lengths):
        alone = model(ids[i : i + 1, :n]).last_hidden_state[0]
        torch.testing.assert_close(little[i, :n], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(much[i, :n], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_bit_for_bit(method, reentrant):
    ids = token_ids(100)
    results = []
    for checkpointing in (False, True):
        model = bert(auto=AutoModelForMaskedLM, sketch={**SKETCH, "method": method}).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_eval_is_deterministic_and_independent_of_the_generator():
    model = bert(sketch={**SKETCH, "method": "skeinformer"})
    ids = token_ids()
    first = model(ids).last_hidden_state
    torch.manual_seed(77)
    assert torch.equal(model(ids).last_hidden_state, first)


def test_no_parameters_are_added():
    exact, model = bert("sdpa", sketch=None), bert()
    assert list(exact.state_dict()) == list(model.state_dict())
    assert type(exact) is type(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = bert().to(dtype)
    output = model(token_ids(200)).last_hidden_state
    assert output.dtype == dtype and output.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert bert()(token_ids(200)).last_hidden_state.isfinite().all()


def test_training_with_attention_dropout():
    model = bert(auto=AutoModelForMaskedLM, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0).train()
    ids = token_ids(100)
    torch.manual_seed(1)
    losses = [model(ids, labels=ids).loss for _ in range(2)]
    assert losses[0] != losses[1]
    torch.manual_seed(1)
    assert model(ids, labels=ids).loss == losses[0]


def test_the_tokenizer_and_a_saved_model_need_nothing_of_ours(tmp_path):
    """Without hf-skein the same files are a working exact model."""
    bert().save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["hf_skein"] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path)!r})
output = model(torch.ones(1, 600, dtype=torch.long)).last_hidden_state
print(type(model).__name__, model.config._attn_implementation, output.isfinite().all().item())
"""
    assert run_python(code).split() == ["BertModel", "sdpa", "True"]
