"""`skein_attention`: the promises that can be stated without a model, and the PyTorch path against the reference."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from hf_skein import SkeinConfig, attention, second_order, skein_attention, torch_path
from hf_skein.sketch import adaptive, skeinformer
from hf_skein.sketch.baselines import v_mean


# ‖out - ref‖ / ‖ref‖. float64: rounding of sums in another order. float32: the same, amplified by the exponentials of
# logits up to about 10. Half precision: the inputs and the result are rounded to 11 or 8 bits, arithmetic is float32.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

SMALL = {"num_columns": 16, "num_strata": 8, "block_size": 16, "min_length": 0}


def inputs(n_q, n_k=None, batch=2, heads=4, kv_heads=None, p=24, pv=None, dtype=torch.float64, grad=False):
    n_k, kv_heads, pv = n_k or n_q, kv_heads or heads, pv or p
    shapes = ((heads, n_q, p), (kv_heads, n_k, p), (kv_heads, n_k, pv))
    return tuple(torch.randn(batch, *shape, dtype=dtype).requires_grad_(grad) for shape in shapes)


def exact(query, key, value, scale=None):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = (query.shape[-1] ** -0.5 if scale is None else scale) * query @ key.mT
    return logits.softmax(-1) @ value


def error(result, reference):
    assert result.shape == reference.shape
    assert result.isfinite().all()
    return ((result.double() - reference.double()).norm() / reference.double().norm()).item()


# --- the PyTorch path is the reference ---

VARIANTS = [
    *({"method": m, "residual": r} for m, r in itertools.product(("adaptive", "skeinformer"), (None, "mean"))),
    {"method": "adaptive", "residual": "geometric"},
    {"method": "skeinformer", "residual": "second_order"},
    {"method": "adaptive", "num_strata": 1},
    {"method": "adaptive", "num_strata": 300, "max_blocks": 1},
    {"method": "adaptive", "row_normalization": "simple"},
    {"method": "skeinformer", "row_normalization": "simple"},
    {"method": "adaptive", "row_normalization": "none"},
    {"method": "skeinformer", "row_normalization": "none"},
    {"method": "adaptive", "column_sampling": "uniform"},
    {"method": "skeinformer", "column_sampling": "uniform", "pilot_reutilization": False},
    {"method": "adaptive", "num_pilots": 3, "exact_rows": 4},
    {"method": "adaptive", "exact_rows": 0, "max_blocks": 3},
    {"method": "skeinformer", "num_pilots": 5},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("n_q", "n_k", "kv_heads"), [(257, 257, 2), (63, 130, 4), (65, 17, 1)])
def test_outputs_and_gradients_match_the_reference(variant, n_q, n_k, kv_heads, poisoned):
    query, key, value = inputs(n_q, n_k, kv_heads=kv_heads, pv=20, grad=True)
    mask = torch.rand(2, n_k) < 0.9 if n_k > 17 else None
    probe = torch.randn(2, 4, n_q, 20, dtype=torch.float64)
    results = []
    for backend in ("reference", "torch"):
        config = SkeinConfig(**{**SMALL, **variant, "backend": backend})
        output = skein_attention(query, key, value, mask, config=config)
        results.append([output, *torch.autograd.grad((output * probe).sum(), (query, key, value))])
    for reference, result in zip(*results, strict=True):
        assert result.dtype == torch.float64
        assert error(result, reference) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_lower_precision_matches_the_float64_reference(method, dtype, monkeypatch):
    """The float64 reference takes over what the call selected: a choice is not continuous."""
    query, key, value = (x.detach().requires_grad_() for x in inputs(200, p=40, dtype=dtype))
    config = SkeinConfig(**SMALL, method=method)
    selections = []
    monkeypatch.setitem(attention._SELECT, method, recording(attention._SELECT[method], selections))
    output = skein_attention(query, key, value, config=config)
    grads = torch.autograd.grad(output.float().square().sum(), (query, key, value))
    monkeypatch.setitem(attention._SELECT, method, lambda *_: selections.pop(0))
    double = tuple(x.detach().double().requires_grad_() for x in (query, key, value))
    reference = skein_attention(*double, config=dataclasses.replace(config, backend="reference"))
    reference_grads = torch.autograd.grad(reference.square().sum(), double)
    assert output.dtype == dtype and not selections
    for result, expected in zip((output, *grads), (reference, *reference_grads), strict=True):
        assert error(result, expected) < TOLERANCE[dtype]


def recording(function, results):
    def call(*args):
        results.append(function(*args))
        return results[-1]

    return call


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("variant", [{}, {"block_size": 50}, {"max_blocks": 1}, *VARIANTS[:4]], ids=str)
def test_work_in_pieces_is_the_reference(variant, kv_heads, monkeypatch, poisoned):
    """Every loop over heads, blocks, slots and rows takes several steps."""
    monkeypatch.setattr(attention, "NUMBERS_PER_STEP", 24 * 257)  # one key head at a time
    monkeypatch.setattr(second_order, "LOGITS_PER_STEP", 24 * 70)  # less than two blocks, part of a large one
    monkeypatch.setattr(torch_path, "LOGITS_PER_STEP", 16 * 16 * 4)
    for module in (adaptive, skeinformer):
        monkeypatch.setattr(module, "SCORES_PER_STEP", 257)
    query, key, value = inputs(257, batch=1, kv_heads=kv_heads, pv=20, grad=True)
    probe = torch.randn(1, 4, 257, 20, dtype=torch.float64)
    results = []
    for backend in ("reference", "torch"):
        output = skein_attention(query, key, value, config=SkeinConfig(**{**SMALL, **variant, "backend": backend}))
        results.append([output, *torch.autograd.grad((output * probe).sum(), (query, key, value))])
        monkeypatch.setattr(attention, "NUMBERS_PER_STEP", 2 * 24 * 257)
    for reference, result in zip(*results, strict=True):
        assert error(result, reference) < TOLERANCE[torch.float64]


# --- promise 1: exact when it can be ---


@pytest.mark.parametrize("method", ["adaptive", "skeinformer", "vmean", "exact"])
@pytest.mark.parametrize(("n", "limits"), [(64, {"num_columns": 64, "min_length": 0}), (64, {"min_length": 64})])
def test_short_sequences_are_exact(method, n, limits):
    query, key, value = inputs(n, kv_heads=2, pv=20)
    config = SkeinConfig(**{"num_columns": 16, **limits, "method": method})
    assert error(skein_attention(query, key, value, config=config), exact(query, key, value)) < 1e-12


def test_exact_is_decided_per_sequence():
    query, key, value = inputs(200)
    mask = torch.arange(200) < torch.tensor([[200], [60]])
    output = skein_attention(query, key, value, mask, config=SkeinConfig(num_columns=16, min_length=60))
    assert error(output[1, :, :60], exact(query[1:, :, :60], key[1:, :, :60], value[1:, :, :60])[0]) < 1e-12
    assert error(output[0], exact(query[:1], key[:1], value[:1])[0]) > 1e-3


def test_more_columns_are_more_accurate():
    query, key, value = inputs(512, batch=1)
    reference = exact(query, key, value)
    for method in ("adaptive", "skeinformer"):
        errors = [
            error(
                skein_attention(query, key, value, config=SkeinConfig(method=method, num_columns=d, min_length=0)),
                reference,
            )
            for d in (32, 128, 400)
        ]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 0.5


def test_method_vmean():
    query, key, value = inputs(100, kv_heads=2)
    output = skein_attention(query, key, value, config=SkeinConfig(method="vmean", **SMALL))
    torch.testing.assert_close(output, v_mean(query, value.repeat_interleave(2, 1)))


# --- promise 2: a function of the sequence alone ---

METHODS = [{"method": "adaptive"}, {"method": "skeinformer"}, {"method": "adaptive", "column_sampling": "uniform"}]


@pytest.mark.parametrize("variant", METHODS, ids=str)
def test_batch_neighbours_and_padding_change_nothing(variant):
    config = SkeinConfig(**SMALL, **variant)
    query, key, value = inputs(1300, batch=3, dtype=torch.float32)
    lengths = (300, 97, 211)
    mask = torch.arange(1300) < torch.tensor(lengths)[:, None]
    together = skein_attention(query, key, value, mask, config=config)
    for i, n in enumerate(lengths):
        alone = [x[i : i + 1, :, :n] for x in (query, key, value)]
        expected = skein_attention(*alone, config=config)[0]
        assert torch.equal(together[i, :, :n], expected)
        assert (together[i, :, n:] == 0).all()
        left = [F.pad(x, (0, 0, 50, 7), value=torch.nan) for x in alone]
        left_mask = F.pad(torch.ones(1, n, dtype=torch.bool), (50, 7))
        assert torch.equal(skein_attention(*left, left_mask, config=config)[0, :, 50:-7], expected)


@pytest.mark.parametrize("variant", METHODS, ids=str)
def test_the_global_generator_is_neither_read_nor_advanced(variant):
    query, key, value = inputs(100)
    config = SkeinConfig(**SMALL, **variant)
    first = skein_attention(query, key, value, config=config)
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    assert torch.equal(skein_attention(query, key, value, config=config), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_layer_and_head_change_the_draws():
    query, key, value = (x[:, :1].expand(-1, 2, -1, -1) for x in inputs(100, batch=1))
    base = SkeinConfig(**SMALL, method="skeinformer")
    output = skein_attention(query, key, value, config=base)
    assert not torch.equal(output[:, 0], output[:, 1])
    assert not torch.equal(output, skein_attention(query, key, value, config=base, layer=1))
    other = SkeinConfig(**SMALL, method="skeinformer", seed=1)
    assert not torch.equal(output, skein_attention(query, key, value, config=other))


# --- promise 4: stable ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_extreme_logits(variant, dtype):
    query, key, value = inputs(130, dtype=torch.float32, batch=1)
    query, key = (x * (1e4 / (query @ key.mT).abs().max() * 24**0.5) ** 0.5 for x in (query, key))
    query, key, value = (x.to(dtype).detach().requires_grad_() for x in (query, key, value))
    output = skein_attention(query, key, value, config=SkeinConfig(**{**SMALL, **variant}))
    output.float().sum().backward()
    assert all(x.isfinite().all() for x in (output, query.grad, key.grad, value.grad))
    bound = 3 if variant.get("row_normalization") != "none" else 10
    assert output.abs().max() <= bound * value.abs().max()


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_autocast_does_not_lower_the_precision_of_the_sketch(method):
    query, key, value = (3 * x for x in inputs(300, batch=1, p=40, dtype=torch.float32))
    config = SkeinConfig(**SMALL, method=method)
    expected = skein_attention(query, key, value, config=config)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(skein_attention(query, key, value, config=config), expected)


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_backward_inside_autocast_is_that_outside(method):
    query, key, value = inputs(300, batch=1, p=40, dtype=torch.float32, grad=True)
    config = SkeinConfig(**SMALL, method=method)
    expected = torch.autograd.grad(
        skein_attention(query, key, value, config=config).square().sum(), (query, key, value)
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = skein_attention(query, key, value, config=config)
        result = torch.autograd.grad(output.square().sum(), (query, key, value))
    for one, other in zip(result, expected, strict=True):
        assert error(one, other) < TOLERANCE[torch.float32]


def test_everything_may_be_dropped():
    query, key, value = inputs(100, batch=1)
    config = SkeinConfig(**SMALL)
    assert skein_attention(query, key, value, config=config, dropout=1.0)[:, :, 1:].isfinite().all()


def test_exact_rows_are_columns_however_columns_are_sampled():
    query, key, value = (x[0] for x in inputs(200, batch=1))
    for sampling in ("importance", "uniform"):
        config = SkeinConfig(**SMALL, exact_rows=3, column_sampling=sampling)
        columns = adaptive.select(query, key, value, 0.2, config, 0, torch.arange(4)).columns
        assert all((columns == row).any(-1).all() for row in range(3))


def test_a_query_that_is_not_finite_spoils_its_own_row_only():
    for poison in (torch.nan, torch.inf):
        query, key, value = inputs(301, batch=1, p=24, dtype=torch.float32)
        query[0, :, 137, 3] = poison
        output = skein_attention(query, key, value, config=SkeinConfig(**SMALL))
        finite = output.isfinite().all(-1)
        assert not finite[0, :, 137].any()
        assert finite.sum() >= 4 * (301 - 16)  # at most the block that shares its pilot
        assert len(torch.unique(output[0, 0][finite[0, 0]], dim=0)) == finite[0, 0].sum()


def test_empty_batch():
    query, key, value = inputs(100, batch=0)
    assert skein_attention(query, key, value, config=SkeinConfig(**SMALL)).shape == query.shape


def test_a_common_shift_of_all_keys_changes_nothing():
    query, key, value = inputs(150, dtype=torch.float32)
    config = SkeinConfig(**SMALL)
    shifted = skein_attention(query, key + 30 * torch.randn(24), value, config=config)
    assert error(shifted, skein_attention(query, key, value, config=config)) < 1e-3


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_degenerate_inputs(variant, poisoned):
    config = SkeinConfig(**{**SMALL, **variant})
    query, key, value = (x.detach() for x in inputs(100, dtype=torch.float32))
    same = (query[:, :, :1].expand_as(query), key[:, :, :1].expand_as(key), value[:, :, :1].expand_as(value))
    output = skein_attention(*same, config=config)
    if variant.get("row_normalization") == "none":
        assert output.isfinite().all()
    else:
        assert error(output, same[2]) < 1e-5
    zero_value = skein_attention(query, key, torch.zeros_like(value), config=config)
    assert (zero_value.abs() < 1e-6).all()


def test_rows_of_padding_and_empty_sequences(poisoned):
    query, key, value = inputs(100, batch=3, dtype=torch.float32, grad=True)
    mask = torch.arange(100) < torch.tensor([[100], [1], [0]])
    for config in (SkeinConfig(**SMALL), SkeinConfig(method="skeinformer", **SMALL), SkeinConfig()):
        output = skein_attention(query, key, value, mask, config=config)
        torch.testing.assert_close(output[1, :, :1], value[1, :, :1])
        assert (output[2] == 0).all()
        grads = torch.autograd.grad(output.sum(), (query, key, value))
        assert all(g.isfinite().all() for g in grads)
        assert (grads[2][2] == 0).all()


@pytest.mark.parametrize("n", [1, 2, 16, 17, 18])
def test_tiny_lengths(n):
    query, key, value = inputs(n)
    for method in ("adaptive", "skeinformer"):
        output = skein_attention(query, key, value, config=SkeinConfig(**SMALL, method=method))
        assert output.isfinite().all()
        if n <= 16:
            assert error(output, exact(query, key, value)) < 1e-12


def test_poison_in_the_padding_stays_there():
    query, key, value = inputs(100, dtype=torch.float32)
    mask = torch.arange(100) < torch.tensor([[100], [70]])
    for config in (SkeinConfig(**SMALL), SkeinConfig()):
        clean = skein_attention(query, key, value, mask, config=config)
        poisoned = [x.clone() for x in (query, key, value)]
        for x in poisoned:
            x[1, :, 70:] = torch.nan
        for x in poisoned:
            x.requires_grad_()
        output = skein_attention(*poisoned, mask, config=config)
        assert torch.equal(output[1, :, :70], clean[1, :, :70])
        valid = output.transpose(1, 2)[mask]
        for gradient in torch.autograd.grad(valid.square().sum(), poisoned):
            assert gradient.transpose(1, 2)[mask].isfinite().all()


# --- promise 5: linear memory ---


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_no_tensor_grows_with_the_square_of_the_length(method):
    """Largest tensor that any operation makes, forward and backward, at n and 2n."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else (result,):
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.untyped_storage().nbytes())
            return result

    config = SkeinConfig(method=method, num_columns=32, block_size=16, max_blocks=32, min_length=0)
    sizes = []
    for n in (4096, 8192):
        query, key, value = inputs(n, batch=1, heads=2, p=16, dtype=torch.float32, grad=True)
        mask = torch.ones(1, n, dtype=torch.bool)
        mask[0, -5:] = False
        with Largest() as largest:
            skein_attention(query, key, value, mask, config=config).sum().backward()
        sizes.append(largest.size)
    assert sizes[1] <= 2.05 * sizes[0]
    assert sizes[1] < 8192 * 8192 * 4 / 20


def test_32768_tokens_run_forward_and_backward():
    query, key, value = inputs(32768, batch=1, heads=1, p=32, dtype=torch.float32, grad=True)
    skein_attention(query, key, value).sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, key, value))


# --- promise 6: gradients ---


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_are_the_derivative_for_fixed_choices(variant):
    """Finite differences: a step too small to change a choice."""
    query, key, value = inputs(40, batch=1, heads=1, p=4, grad=True)
    config = SkeinConfig(**{**SMALL, **variant})
    probe = torch.randn(1, 1, 40, 4, dtype=torch.float64)

    def loss(*tensors):
        return (skein_attention(*tensors, config=config) * probe).sum()

    inputs_ = (query, key, value)
    steps = [1e-6 * torch.randn_like(x) for x in inputs_]
    for which, grad in enumerate(torch.autograd.grad(loss(*inputs_), inputs_)):
        up, down = ([x.detach().clone() for x in inputs_] for _ in range(2))
        up[which] += steps[which]
        down[which] -= steps[which]
        torch.testing.assert_close((grad * steps[which]).sum(), (loss(*up) - loss(*down)) / 2, rtol=1e-5, atol=1e-13)


def test_dropout_is_unbiased_and_reproducible():
    query, key, value = inputs(120, batch=1, heads=1)
    for method, residual in (("adaptive", None), ("skeinformer", None)):
        config = SkeinConfig(**SMALL, method=method, residual=residual)
        torch.manual_seed(5)
        first = skein_attention(query, key, value, config=config, dropout=0.2)
        torch.manual_seed(5)
        assert torch.equal(first, skein_attention(query, key, value, config=config, dropout=0.2))
        mean = sum(skein_attention(query, key, value, config=config, dropout=0.2) for _ in range(400)) / 400
        plain = skein_attention(query, key, value, config=config)
        assert error(first, plain) > 0.05
        assert error(mean, plain) < 0.1


def test_dropout_drops_a_column_with_all_of_its_value():
    """Values that share a large mean: the noise of dropout is that of exact attention, where columns hold the mass."""
    query, key, value = inputs(40, batch=1, heads=1, p=4)
    query, value = 4 * query, 10 + 0.1 * value
    config = SkeinConfig(num_columns=39, num_strata=1, block_size=16, min_length=0, exact_rows=0)
    assert error(skein_attention(query, key, value, config=config), exact(query, key, value)) < 1e-3
    noise = [
        torch.stack([attend() for _ in range(1000)]).std(0)
        for attend in (
            lambda: skein_attention(query, key, value, config=config, dropout=0.3),
            lambda: F.dropout((query @ key.mT / 2).softmax(-1), 0.3) @ value,
        )
    ]
    assert error(*noise) < 0.1


def test_gradients_with_dropout_are_those_of_what_was_dropped():
    query, key, value = inputs(60, batch=1, heads=1, p=4, grad=True)

    def loss(*tensors):
        torch.manual_seed(3)
        return skein_attention(*tensors, config=SkeinConfig(**SMALL), dropout=0.4).square().sum()

    for which, grad in enumerate(torch.autograd.grad(loss(query, key, value), (query, key, value))):
        step = [1e-6 * torch.randn_like(x) * (i == which) for i, x in enumerate((query, key, value))]
        up, down = ([x.detach() + sign * s for x, s in zip((query, key, value), step, strict=True)] for sign in (1, -1))
        torch.testing.assert_close((grad * step[which]).sum(), (loss(*up) - loss(*down)) / 2, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_function_transforms(method):
    query, key, value = inputs(100, batch=1, grad=True)

    def loss(query, key, value):
        return skein_attention(query, key, value, config=SkeinConfig(**SMALL, method=method)).square().sum()

    expected = torch.autograd.grad(loss(query, key, value), (query, key, value))
    for result, grad in zip(torch.func.grad(loss, (0, 1, 2))(query, key, value), expected, strict=True):
        torch.testing.assert_close(result, grad)
    layer = torch.nn.Linear(24, 24).double()

    def of_weights(weights):
        return loss(torch.func.functional_call(layer, weights, query), key, value)

    found = torch.func.grad(of_weights)(dict(layer.named_parameters()))
    loss(layer(query), key, value).backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


# --- inputs ---


def test_all_forms_of_the_padding_mask_agree():
    query, key, value = inputs(100, dtype=torch.float32)
    mask = torch.arange(100) < torch.tensor([[100], [70]])
    config = SkeinConfig(**SMALL)
    expected = skein_attention(query, key, value, mask, config=config)
    additive = torch.zeros(2, 100).masked_fill(~mask, torch.finfo(torch.float32).min)
    for form in (mask.int(), mask.long(), additive, additive[:, None, None], mask[:, None, None], additive.half()):
        assert torch.equal(skein_attention(query, key, value, form, config=config), expected)
    assert torch.equal(
        skein_attention(query, key, value, torch.ones(2, 100, dtype=torch.bool), config=config),
        skein_attention(query, key, value, config=config),
    )


def test_cross_attention_of_equal_lengths_takes_a_query_mask():
    query, key, value = inputs(100)
    mask = torch.arange(100) < torch.tensor([[100], [70]])
    config = SkeinConfig(**SMALL)
    all_queries = skein_attention(query, key, value, mask, config=config, query_mask=torch.ones_like(mask))
    expected = skein_attention(query[1:], key[1:, :, :70], value[1:, :, :70], config=config)
    assert error(all_queries[1:], expected) < 1e-12


def test_transposed_views_are_accepted():
    query, key, value = (torch.randn(2, 100, 4, 24).transpose(1, 2) for _ in range(3))
    config = SkeinConfig(**SMALL)
    expected = skein_attention(query.contiguous(), key.contiguous(), value.contiguous(), config=config)
    assert error(skein_attention(query, key, value, config=config), expected) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "batch, heads, n, p"),
        (lambda q, k, v: (q, k[:, :3], v), "do not fit"),
        (lambda q, k, v: (q[:, :3], k[:, :2], v[:, :2]), "multiple"),
        (lambda q, k, v: (q, k[..., :5], v), "do not fit"),
        (lambda q, k, v: (q, k.float(), v), "dtype"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "dtype"),
        (lambda q, k, v: (q, k, v, torch.ones(2, 99)), "padding mask"),
        (lambda q, k, v: (q, k, v, torch.ones(2, 1, 100, 100)), "padding mask"),
        (lambda q, k, v: (q, k, v, torch.ones(2, 100)), "additive"),
        (lambda q, k, v: (q, k, v, torch.full((2, 100), -1.5)), "additive"),
        (lambda q, k, v: (q, k, v, torch.full((2, 100), 2)), "0 and 1"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        skein_attention(*change(*inputs(100)), config=SkeinConfig(**SMALL))
