import functools
import math
import subprocess
import sys

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    LongformerConfig,
    LongformerModel,
    NystromformerConfig,
)
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention
from transformers.models.informer.modeling_informer import InformerProbSparseAttention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

import hf_skein
from hf_skein import SkeinConfig
from hf_skein.baselines import NAMES, baseline_attention
from hf_skein.sketch.baselines import BASELINES, landmarks, patterns, projection, random_features


SCALE, SEED, LAYER = 0.4, 3, 1
HEADS = torch.arange(2)
MASKED = [name for name in NAMES if name != "informer-unmasked"]
SIZE = 16
CONFIG = SkeinConfig(num_columns=SIZE, min_length=0, seed=SEED)


@pytest.fixture(autouse=True)
def unregister():
    interfaces = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    before = [dict(mapping) for mapping in interfaces]
    yield
    for mapping, entries in zip(interfaces, before, strict=True):
        mapping.clear()
        mapping.update(entries)


def inputs(n, p=8, heads=2, dtype=torch.float64):
    return torch.randn(3, heads, n, p, dtype=dtype).unbind()


def run(name, query, key, value, size=SIZE):
    return BASELINES[name](query, key, value, SCALE, size, SEED, LAYER, HEADS[: len(query)])


def exact(query, key, value):
    return (SCALE * query @ key.mT).softmax(-1) @ value


# --- each method is its formula, written densely ---


def dense_linformer(query, key, value):
    s = projection.projection(key, SIZE, SEED)
    logits = SCALE * torch.einsum("hip,jd,hjp->hid", query, s, key)
    return torch.einsum("hid,jd,hjv->hiv", logits.softmax(-1), s, value)


def dense_jl(query, key, value):
    s = projection.projection(key, SIZE, SEED)
    return (SCALE * query @ key.mT).softmax(-1) @ (s @ s.T) @ value


def dense_nystromformer(query, key, value):
    def means(x):
        return torch.stack([part.mean(1) for part in x.split([len(r) for r in segments(x.shape[1])], 1)], 1)

    q, k = means(query), means(key)
    inverse = landmarks.pseudo_inverse((SCALE * q @ k.mT).softmax(-1), 6)
    return (SCALE * query @ k.mT).softmax(-1) @ inverse @ (SCALE * q @ key.mT).softmax(-1) @ value


def segments(n):
    return [[i for i in range(n) if i * SIZE // n == c] for c in range(SIZE)]


def dense_performer(query, key, value):
    omega = random_features.orthogonal_features(SIZE, query.shape[-1], SEED, LAYER, query.device)

    def phi(x):
        x = x * math.sqrt(SCALE)
        return torch.exp(x @ omega.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(SIZE)

    kernel = phi(query) @ phi(key).mT
    return kernel / kernel.sum(-1, keepdim=True) @ value


def drawn_keys(heads):
    """Places in `[0, 1)` of the sequence, `[heads, SIZE]`."""
    return hf_skein.sketch.random.uniform(SEED, LAYER, HEADS[:heads], hf_skein.sketch.random.BASELINE_STREAM, SIZE)


def dense_informer(query, key, value):
    sampled = drawn_keys(len(query))
    output = value.mean(1, keepdim=True).expand(*query.shape[:2], -1).clone()
    for head in range(len(query)):
        index = (sampled[head] * key.shape[1]).long()
        measure = [
            max(row := [SCALE * (q @ key[head, j]).item() for j in index]) - sum(row) / SIZE for q in query[head]
        ]
        rows = sorted(range(len(measure)), key=lambda i: -measure[i])[:SIZE]
        output[head, rows] = exact(query, key, value)[head, rows]
    return output


def dense_pattern(is_seen):
    def compute(query, key, value):
        heads, n = query.shape[:2]
        seen = torch.tensor([[[is_seen(h, i, j, n) for j in range(n)] for i in range(n)] for h in range(heads)])
        return (SCALE * query @ key.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ value

    return compute


def longformer_sees(head, i, j, n):
    return abs(i - j) <= SIZE // 2 or i == 0 or j == 0


def bigbird_sees(head, i, j, n):
    size = SIZE // 8
    blocks = -(-n // size)
    i, j = i // size, j // size
    random = drawn_blocks(blocks)[head, i].tolist()
    return abs(i - j) <= 1 or {i, j} & {0, blocks - 1} or j in random


@functools.cache
def drawn_blocks(blocks):
    random = hf_skein.sketch.random
    uniforms = random.uniform(SEED, LAYER, HEADS, random.BASELINE_STREAM, blocks * 3)
    return patterns.random_blocks(uniforms.view(2, blocks, 3))


DENSE = {
    "vmean": lambda query, key, value: value.mean(1, keepdim=True).expand(query.shape),
    "linformer": dense_linformer,
    "linformer-jl": dense_jl,
    "informer": dense_informer,
    "nystromformer": dense_nystromformer,
    "performer": dense_performer,
    "longformer": dense_pattern(longformer_sees),
    "bigbird": dense_pattern(lambda *where: bool(bigbird_sees(*where))),
}


@pytest.mark.parametrize("n", [48, 61])
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_and_its_gradients_are_those_of_its_dense_formula(name, n):
    leaves = [x.requires_grad_() for x in inputs(n)]
    output, expected = run(name, *leaves), DENSE[name](*leaves)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(output)
    ours, theirs = (torch.autograd.grad(x, leaves, gradient, materialize_grads=True) for x in (output, expected))
    torch.testing.assert_close(ours, theirs)


def test_all_baselines_have_a_formula_and_are_different_from_one_another():
    assert DENSE.keys() == BASELINES.keys()
    x = inputs(61)
    outputs = torch.stack([run(name, *x) for name in BASELINES]).flatten(1)
    distances = torch.cdist(outputs, outputs) + torch.eye(len(outputs))
    assert distances.min() > 0.1


# --- where they become exact ---


def test_linformer_is_exact_if_the_projection_is_the_identity(monkeypatch):
    query, key, value = inputs(20)
    monkeypatch.setattr(projection, "_gaussian", lambda rows, columns, *_: torch.eye(32, 20, dtype=torch.float64))
    for name in ("linformer", "linformer-jl"):
        torch.testing.assert_close(run(name, query, key, value, 20), exact(query, key, value))


@pytest.mark.parametrize(("name", "size"), [("informer", 40), ("longformer", 78), ("bigbird", 40), ("bigbird", 8 * 99)])
def test_a_baseline_of_the_size_of_the_sequence_is_exact(name, size):
    query, key, value = inputs(40)
    torch.testing.assert_close(run(name, query, key, value, size), exact(query, key, value))


def test_nystromformer_of_as_many_landmarks_is_exact_once_its_inverse_has_converged():
    query, key, value = inputs(24)
    output = landmarks.nystromformer(query, key, value, SCALE, 24, SEED, LAYER, HEADS, iterations=40)
    torch.testing.assert_close(output, exact(query, key, value), rtol=1e-6, atol=1e-6)


def test_the_pseudo_inverse_converges_to_the_inverse():
    matrix = torch.randn(3, 10, 10, dtype=torch.float64).softmax(-1) + torch.eye(10, dtype=torch.float64)
    matrix = matrix / matrix.sum(-1, keepdim=True)
    errors = [(landmarks.pseudo_inverse(matrix, k) - matrix.inverse()).abs().max().item() for k in (2, 6, 12)]
    assert errors[0] > errors[1] and errors[2] < 1e-9


def test_performer_converges_to_exact_attention():
    query, key, value = inputs(60)
    query, key = query / 2, key / 2  # the variance grows with the exponential of their norms
    expected = exact(query, key, value)
    errors = [((run("performer", query, key, value, d) - expected).norm() / expected.norm()).item() for d in (8, 16384)]
    assert errors[1] < 0.1 < 5 * errors[1] < errors[0]


def test_vmean_is_exact_if_all_keys_are_alike():
    query, key, value = inputs(20)
    key = key[:, :1].expand_as(key)
    torch.testing.assert_close(run("vmean", query, key, value), exact(query, key, value))


# --- their random numbers ---


def test_the_projection_is_unbiased_and_a_longer_one_begins_like_a_shorter_one():
    like = torch.empty(1, 30, 1, dtype=torch.float64)
    products = torch.stack([(s := projection.projection(like, 20, seed)) @ s.T for seed in range(400)])
    deviation = products.std(0) / 400**0.5
    assert (((products.mean(0) - torch.eye(30)) / deviation).abs() < 5).all()  # 900 of them
    longer = projection.projection(torch.empty(1, 200, 1, dtype=torch.float64), 20, 7)
    torch.testing.assert_close(longer[:30], projection.projection(like, 20, 7))


def test_features_are_orthogonal_in_blocks_and_as_long_as_normal_vectors():
    omega = random_features.orthogonal_features(64 * 8, 8, SEED, LAYER, torch.device("cpu")).view(64, 8, 8)
    products = omega @ omega.mT
    squares = products.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(products, torch.diag_embed(squares))
    assert squares.mean().item() == pytest.approx(8, abs=5 * (2 * 8 / 512) ** 0.5)
    other = random_features.orthogonal_features(8, 8, SEED, LAYER + 1, torch.device("cpu"))
    assert not torch.allclose(other, omega[0])


def test_random_blocks_are_distinct_uniform_and_never_those_seen_anyway():
    blocks = 12
    chosen = patterns.random_blocks(torch.rand(4000, blocks, 3))
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all()
    for i in range(blocks):
        counts = chosen[:, i].flatten().bincount(minlength=blocks)
        allowed = torch.tensor([0 < j < blocks - 1 and abs(i - j) > 1 for j in range(blocks)])
        assert (counts[~allowed] == 0).all()
        share = 3 / allowed.sum()
        deviation = (4000 * share * (1 - share)).sqrt()
        assert ((counts[allowed] - 4000 * share).abs() < 5 * deviation).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_global_generator_is_neither_read_nor_advanced(name):
    query, key, value = (x[None] for x in inputs(61))
    state = torch.get_rng_state()
    first = baseline_attention(query, key, value, config=CONFIG, method=name)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(first, baseline_attention(query, key, value, config=CONFIG, method=name))


@pytest.mark.parametrize("name", ["linformer", "performer"])
def test_numbers_that_are_kept_serve_training_after_inference(name):
    projection._gaussian.cache_clear(), random_features.orthogonal_features.cache_clear()
    query, key, value = inputs(61)
    with torch.inference_mode():
        run(name, query, key, value)
    run(name, query.requires_grad_(), key, value).sum().backward()
    assert query.grad.abs().max() > 0


# --- what Transformers has ---


def module_inputs(module, n, heads):
    """Hidden states `[1, n, hidden]` and what a self-attention's projections make of them, `[heads, n, p]` each."""
    module.double().eval()
    hidden = torch.randn(1, n, module.query.in_features, dtype=torch.float64)
    parts = (project(hidden)[0].unflatten(-1, (heads, -1)) for project in (module.query, module.key, module.value))
    return hidden, *(x.transpose(0, 1) for x in parts)


@torch.no_grad()
def test_nystromformer_is_that_of_transformers():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_landmarks": SIZE, "segment_means_seq_len": 64}
    module = NystromformerSelfAttention(NystromformerConfig(**sizes))
    module.conv_kernel_size = None
    module.init_option = "exact"  # per head, as in the paper; Transformers' default looks at all heads of the batch
    hidden, *qkv = module_inputs(module, 64, 4)
    ours = BASELINES["nystromformer"](*qkv, 8**-0.5, SIZE, 0, 0, torch.arange(4))
    torch.testing.assert_close(ours.transpose(0, 1).flatten(1), module(hidden)[0][0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_longformer_is_that_of_transformers():
    n, config = 64, LongformerConfig(hidden_size=32, num_attention_heads=4, attention_window=[SIZE])
    module = LongformerSelfAttention(config, 0)
    for name in ("query", "key", "value"):  # global tokens have projections of their own; here they are the same
        getattr(module, f"{name}_global").load_state_dict(getattr(module, name).state_dict())
    hidden, *qkv = module_inputs(module, n, 4)
    is_global = torch.zeros(1, n, dtype=torch.bool)
    is_global[0, 0] = True
    mask = torch.zeros(1, n, dtype=torch.float64).masked_fill(is_global, 10000.0)
    (theirs,) = module(
        hidden,
        attention_mask=mask,
        is_index_masked=torch.zeros_like(is_global),
        is_index_global_attn=is_global,
        is_global_attn=True,
    )
    ours = BASELINES["longformer"](*qkv, 8**-0.5, SIZE, 0, 0, torch.arange(4))
    torch.testing.assert_close(ours.transpose(0, 1).flatten(1), theirs[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_bigbird_is_that_of_transformers_with_the_same_random_blocks(monkeypatch):
    n, block = 64, SIZE // 8
    config = BigBirdConfig(hidden_size=16, num_attention_heads=2, block_size=block, num_random_blocks=3)
    module = BigBirdBlockSparseAttention(config)
    drawn = drawn_blocks(n // block)[:, 1:-1].numpy()
    monkeypatch.setattr(module, "_bigbird_block_rand_mask_with_head", lambda **_: list(drawn))
    hidden, *qkv = module_inputs(module, n, 2)
    names = ("from_blocked_mask", "band_mask", "from_mask", "to_mask")
    made = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, n, dtype=torch.float64), block)
    masks = dict(zip(names, made, strict=True))
    theirs, _ = module(hidden, **masks, to_blocked_mask=masks["from_blocked_mask"])
    ours = BASELINES["bigbird"](*qkv, 8**-0.5, SIZE, SEED, LAYER, torch.arange(2))
    torch.testing.assert_close(ours.transpose(0, 1).flatten(1), theirs[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_informer_is_that_of_transformers_with_the_same_sample(monkeypatch):
    n = 3 * SIZE  # Transformers then samples n keys, and calculates SIZE rows, 4 times the logarithm of n, exactly
    module = InformerProbSparseAttention(8, 1, sampling_factor=4).double().eval()
    module.out_proj = torch.nn.Identity()
    hidden = torch.randn(1, n, 8, dtype=torch.float64)
    ours = run_informer(module, hidden)
    sample = (drawn_keys(1) * n).long()[0]
    monkeypatch.setattr(torch, "randint", lambda *_: sample.repeat(3))
    theirs = module(hidden)[0]
    assert (theirs - theirs[:, :1]).abs().amax(-1).ne(0).sum() >= SIZE - 1  # not all rows are the mean
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(torch, "randint", lambda *_: torch.zeros(n, dtype=torch.long))
    assert not torch.allclose(ours, module(hidden)[0])  # the sample matters


def run_informer(module, hidden):
    qkv = (project(hidden) for project in (module.q_proj, module.k_proj, module.v_proj))
    return BASELINES["informer"](*qkv, module.scaling, SIZE, SEED, LAYER, HEADS[:1])


# --- behind the signature of skein_attention ---


@pytest.mark.parametrize("name", MASKED)
def test_padding_its_amount_and_batch_neighbours_change_nothing(name):
    lengths, n = (61, 40, SIZE - 3, 0), 75
    query, key, value = torch.randn(3, 4, 2, n, 8, dtype=torch.float64).unbind()
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    mask[1] = mask[1][torch.randperm(n)]  # not only at the end
    for x in (query, key, value):
        x.masked_fill_(~mask[:, None, :, None], torch.nan)
    output = baseline_attention(query, key, value, mask, config=CONFIG, method=name)
    assert (output.masked_select(~mask[:, None, :, None]) == 0).all()
    for i, valid in enumerate(mask[:3]):
        alone = (x[i : i + 1, :, valid] for x in (query, key, value))
        expected = baseline_attention(*alone, config=CONFIG, method=name)
        assert expected.isfinite().all()
        torch.testing.assert_close(output[i, :, valid], expected[0])


def test_informer_unmasked_takes_padding_for_tokens():
    query, key, value = torch.randn(3, 1, 2, 75, 8, dtype=torch.float64).unbind()
    mask = (torch.arange(75) < 50)[None]
    unmasked = baseline_attention(query, key, value, mask, config=CONFIG, method="informer-unmasked")
    torch.testing.assert_close(unmasked, baseline_attention(query, key, value, config=CONFIG, method="informer"))
    masked = baseline_attention(query, key, value, mask, config=CONFIG, method="informer")
    assert not torch.allclose(unmasked[..., :50, :], masked[..., :50, :])


@pytest.mark.parametrize("name", NAMES)
def test_grouped_queries_half_precision_and_values_of_another_width(name):
    query, key = torch.randn(2, 4, 61, 8).bfloat16(), torch.randn(2, 2, 61, 8).bfloat16()
    value = torch.randn(2, 2, 61, 5).bfloat16()
    output = baseline_attention(query, key, value, config=CONFIG, method=name)
    assert output.dtype == torch.bfloat16 and output.shape == (2, 4, 61, 5)
    wide = (query.double(), key.double().repeat_interleave(2, 1), value.double().repeat_interleave(2, 1))
    expected = baseline_attention(*wide, config=CONFIG, method=name)
    assert (output.double() - expected).norm() < 0.01 * expected.norm()  # bfloat16 of the result: 2**-9 at most


@pytest.mark.parametrize("name", NAMES)
def test_short_sequences_are_exact(name):
    query, key, value = torch.randn(3, 1, 2, SIZE, 8, dtype=torch.float64).unbind()
    longer = torch.randn(3, 1, 2, 61, 8, dtype=torch.float64).unbind()
    for x, config in (((query, key, value), CONFIG), (longer, SkeinConfig(num_columns=SIZE, min_length=61))):
        expected = exact(x[0] * 8**-0.5 / SCALE, x[1], x[2])
        torch.testing.assert_close(baseline_attention(*x, config=config, method=name), expected)


def test_a_layer_can_be_exact_and_have_a_size_of_its_own():
    query, key, value = torch.randn(3, 1, 2, 61, 8, dtype=torch.float64).unbind()
    config = SkeinConfig(num_columns=SIZE, min_length=0, layers={0: {"method": "exact"}, 1: {"num_columns": 24}})
    first, second = (baseline_attention(query, key, value, config=config, method="linformer", layer=i) for i in (0, 1))
    torch.testing.assert_close(first, exact(query * 8**-0.5 / SCALE, key, value))
    own = SkeinConfig(num_columns=24, min_length=0)
    torch.testing.assert_close(second, baseline_attention(query, key, value, config=own, method="linformer", layer=1))


@pytest.mark.parametrize("name", ["vmean", "linformer", "linformer-jl", "informer", "nystromformer", "performer"])
def test_queries_from_elsewhere(name):
    query, key, value = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 61, 8), torch.randn(1, 2, 61, 8)
    assert baseline_attention(query, key, value, config=CONFIG, method=name).isfinite().all()


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_a_window_refuses_queries_from_elsewhere(name):
    with pytest.raises(ValueError, match="9 queries and 61 keys"):
        key = torch.randn(1, 2, 61, 8)
        baseline_attention(torch.randn(1, 2, 9, 8), key, key, config=CONFIG, method=name)


def test_what_a_baseline_cannot_do_is_an_error():
    x = torch.randn(1, 2, 61, 8)
    with pytest.raises(ValueError, match=r"no attention dropout.*attention_probs_dropout_prob=0"):
        baseline_attention(x, x, x, method="linformer", dropout=0.1)
    with pytest.raises(ValueError, match="no global tokens"):
        baseline_attention(x, x, x, method="linformer", global_mask=torch.ones(1, 61))
    with pytest.raises(ValueError, match="method is 'linear'; baselines are 'vmean', 'linformer'"):
        baseline_attention(x, x, x, method="linear")
    with pytest.raises(ValueError, match="do not fit together"):
        baseline_attention(x, x[..., :4], x, method="linformer")


def test_extreme_logits_give_no_nan():
    query, key, value = (x[None] for x in inputs(61, dtype=torch.float32))
    for name in NAMES:
        output = baseline_attention(100 * query, 100 * key, value, config=CONFIG, method=name)
        assert output.isfinite().all(), name


# --- in a model ---


def bert(**settings):
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=80,
        initializer_range=0.3,
        **settings,
    )
    return BertModel(config).eval()


def test_nothing_is_registered_on_import():
    code = (
        "import hf_skein, hf_skein.baselines, hf_skein.registration, transformers as t;"
        "keys = lambda: [n for i in (t.AttentionInterface, t.AttentionMaskInterface) for n in i._global_mapping];"
        "print([n for n in keys() if ':' in n]); hf_skein.register_baselines(); print(sum(':' in n for n in keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", str(2 * len(NAMES))]


def test_a_name_that_is_not_registered_says_how_to(monkeypatch):
    for interface in (AttentionInterface, AttentionMaskInterface):  # another test may have registered it
        monkeypatch.delitem(interface._global_mapping, "skein:linformer", raising=False)
    with pytest.raises(ValueError, match=r"'skein:linformer' is not registered.*register_baselines\(\)"):
        bert(attn_implementation="skein:linformer")
    hf_skein.register_baselines()
    with pytest.raises(ValueError, match="'skein:linear' is not registered"):
        bert(attn_implementation="skein:linear")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_model_runs_a_baseline_and_its_padding_arrives(name):
    assert f"skein:{name}" in hf_skein.register_baselines() == hf_skein.register_baselines()
    model = bert(attn_implementation=f"skein:{name}")
    hf_skein.configure(model, num_columns=SIZE, min_length=0)
    seen = []
    attention = model.encoder.layer[1].attention.self
    attention.register_forward_hook(lambda module, args, output: seen.append((args[0], output[0])))
    ids = torch.randint(1, 50, (1, 61))
    alone = model(ids).last_hidden_state
    hidden, output = seen[0]
    qkv = (f(hidden).unflatten(-1, (2, 8)).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    config = SkeinConfig(num_columns=SIZE, min_length=0)
    expected = baseline_attention(*qkv, config=config, method=name, layer=1).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, expected)
    mask = torch.ones(1, 80, dtype=torch.int64).index_fill(1, torch.arange(61, 80), 0)
    padded = model(torch.cat([ids, torch.randint(1, 50, (1, 19))], 1), mask).last_hidden_state[:, :61]
    assert torch.allclose(padded, alone, atol=1e-5) == (name != "informer-unmasked")
    model.set_attn_implementation("sdpa")
    difference = (model(ids).last_hidden_state - alone).abs().max().item()
    assert difference > 1e-4


@torch.no_grad()
def test_what_cannot_be_sketched_stays_exact():
    hf_skein.register_baselines()
    model = bert(is_decoder=True)
    ids = torch.randint(1, 50, (1, 61))
    expected = model(ids).last_hidden_state
    model.set_attn_implementation("skein:linformer")
    hf_skein.configure(model, num_columns=SIZE, min_length=0)
    torch.testing.assert_close(model(ids).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(LongformerModel, LongformerConfig), (BigBirdModel, BigBirdConfig)]
)
def test_a_class_that_would_run_its_own_attention_is_refused(model_class, config_class):
    hf_skein.register_baselines()
    config = config_class(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=50
    )
    with pytest.raises(ValueError, match=r"attn_implementation='skein:performer'.*would silently run another"):
        model_class._from_config(config, attn_implementation="skein:performer")


def test_attention_dropout_of_a_model_in_training_is_an_error():
    hf_skein.register_baselines()
    model = bert(attn_implementation="skein:nystromformer").train()
    hf_skein.configure(model, num_columns=SIZE, min_length=0)
    with pytest.raises(ValueError, match="no attention dropout"):
        model(torch.randint(1, 50, (1, 61)))
    model.config.attention_probs_dropout_prob = 0.0
    model = BertModel(model.config).train()
    model(torch.randint(1, 50, (1, 61))).last_hidden_state.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())
