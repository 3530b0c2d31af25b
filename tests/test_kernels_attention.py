"""The kernels that attend, given the reference's selection, against the float64 reference: outputs and gradients.

Without a GPU they run in Triton's interpreter.
"""

import pytest
import torch
import triton
import triton.language as tl
from test_attention import error

from hf_skein import SkeinConfig
from hf_skein.kernels import exact_rows, moments, ops, tiles
from hf_skein.kernels.layout import Layout, Selection, mark_exact, num_blocks, ragged
from hf_skein.sketch import adaptive, routing, rows, skeinformer


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ‖out - ref‖ / ‖ref‖, outputs and gradients. float32: rounding, amplified by exponentials. Half precision: inputs,
# centred keys, weights and the result are rounded to 11 or 8 bits (the interpreter cuts bfloat16 off: twice that).
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2.5e-2}

# Of the interpreter, for the logarithm of the size of an empty stratum.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")

SMALL = {"num_columns": 16, "num_strata": 8, "block_size": 32, "min_length": 0}
SELECT = {"adaptive": adaptive.select, "skeinformer": skeinformer.select}


def inputs(n_q, n_k=None, batch=2, heads=2, kv_heads=1, p=24, pv=None, dtype=torch.float32, scale=1.0):
    """Transposed views, as Transformers passes them."""
    n_k, pv = n_k or n_q, pv or p
    shapes = (n_q, heads, p), (n_k, kv_heads, p), (n_k, kv_heads, pv)
    return tuple((scale * torch.randn(batch, *s, device=DEVICE)).to(dtype).transpose(1, 2) for s in shapes)


def poison(x, mask):
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], torch.nan)


def valid(index, length, i):
    return index[i, : length[i]].long()


def reference_selection(query, key, value, query_mask, key_mask, config, scale):
    """The layout, the selection as the kernels take it, and as the reference does, of every sequence."""
    batch, heads, n_q, _ = query.shape
    kv_heads, n_k = key.shape[1:3]
    is_adaptive = config.method == "adaptive"
    most = (config.block_size, config.max_blocks) if is_adaptive else (2**31 - 1, 1)
    layout = ragged(query_mask, key_mask, query, key, *most, config.exact_length)
    pilots = config.num_pilots or config.num_columns
    exact = config.exact_rows if is_adaptive else pilots * config.pilot_reutilization
    order, columns, exact_rows, stratum = (
        torch.full((batch, *shape), -7, dtype=torch.int32, device=DEVICE)
        for shape in (
            (heads, n_q),
            (heads, num_blocks(n_q, *most), config.num_columns),
            (heads, exact),
            (kv_heads, n_k),
        )
    )
    exact_rows.fill_(-1)
    selections = []
    for i in range(batch):
        selections.append(None)
        if layout.blocks[i] == 0:
            continue
        q, k, v = sequence(query, key, value, layout, i)
        selections[i] = s = SELECT[config.method](q, k, v, scale, config, 0, torch.arange(heads))
        queries, keys = valid(layout.query_index, layout.query_length, i), valid(layout.key_index, layout.key_length, i)
        order[i, :, : len(queries)] = queries[s.blocks.index[:, s.blocks.filled]]
        columns[i, :, : s.columns.shape[1]] = keys[s.columns]
        repeated = (s.exact_rows[:, None] == s.exact_rows[..., None]).tril(-1).any(-1)
        exact_rows[i, :, : s.exact_rows.shape[1]] = queries[s.exact_rows].int().masked_fill(repeated, -1)
        stratum[i][:, keys] = s.stratum[:: heads // kv_heads].int()
    nothing = torch.empty(batch, heads, 0, value.shape[-1], device=DEVICE)
    marked = mark_exact(order, exact_rows, layout)[0]
    return layout, Selection(marked, columns, exact_rows, stratum, nothing, nothing[..., 0]), selections


def sequence(query, key, value, layout, i):
    """One sequence without its padding, float64, keys centred and repeated for every head."""
    queries, keys = valid(layout.query_index, layout.query_length, i), valid(layout.key_index, layout.key_length, i)
    q, k, v = query[i, :, queries].double(), key[i, :, keys].double(), value[i, :, keys].double()
    group = len(q) // len(k)
    return q, (k - k.mean(1, keepdim=True)).repeat_interleave(group, 0), v.repeat_interleave(group, 0)


def reference(query, key, value, layout, selections, config, scale):
    outputs = []
    for i, selection in enumerate(selections):
        q, k, v = sequence(query, key, value, layout, i)
        if selection is not None:
            rows_ = rows.attend(q, k, v, selection, scale, config)
        elif k.shape[1] == 0:
            rows_ = 0 * q[..., :1].expand(-1, -1, v.shape[-1])
        else:
            rows_ = (scale * q @ k.mT).softmax(-1) @ v
        output = rows_.new_zeros(*query.shape[1:3], v.shape[-1])
        outputs.append(output.index_copy(1, valid(layout.query_index, layout.query_length, i), rows_))
    return torch.stack(outputs)


def attend(query, key, value, layout, selection, config, scale, is_ragged=True, dropout=0.0, seed=None):
    means = exact_rows.rows_and_means(query.detach(), key.detach(), value.detach(), 0, layout, scale)[:2]
    is_adaptive = config.method == "adaptive"
    kind = config.resolved_residual if config.row_normalization == "adaptive" else config.row_normalization
    return ops.attend(
        query, key, value, [*means, *selection, *layout], seed, is_ragged,
        config.max_blocks if is_adaptive else 1, config.block_size if is_adaptive else 2**31 - 1,
        config.resolved_strata, kind, scale, dropout,
    )[0]  # fmt: skip


def check(query, key, value, query_mask, key_mask, config, scale=None):
    """Outputs and gradients are the reference's; what stands in the padding does not matter."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = poison(query, query_mask), poison(key, key_mask), poison(value, key_mask)
    layout, selection, selections = reference_selection(query, key, value, query_mask, key_mask, config, scale)
    double = [x.double().requires_grad_() for x in (query, key, value)]
    expected = reference(*double, layout, selections, config, scale)
    probe = torch.randn_like(expected).to(query.dtype)
    expected_grads = torch.autograd.grad((expected * probe).sum(), double)
    single = [x.detach().requires_grad_() for x in (query, key, value)]
    is_ragged = query_mask is not None or key_mask is not None
    output = attend(*single, layout, selection, config, scale, is_ragged)
    grads = torch.autograd.grad((output * probe).sum(), single)
    for result, wanted, like in zip((output, *grads), (expected, *expected_grads), (query, *single), strict=True):
        assert result.dtype == like.dtype
        assert error(result, wanted) < TOLERANCE[query.dtype]
    return selections


CASES = {
    "plain": ({}, {"n_q": 65}),
    "one block, many strata": ({"max_blocks": 1, "num_strata": 40}, {"n_q": 63, "batch": 1}),
    "more strata than a tile has": ({"num_strata": 530}, {"n_q": 65, "n_k": 560, "batch": 1, "p": 16}),
    "one stratum, no exact row": ({"num_strata": 1, "exact_rows": 0}, {"n_q": 33, "n_k": 70, "batch": 1}),
    "several exact rows, pv != p": ({"exact_rows": 5}, {"n_q": 65, "p": 40, "pv": 20, "kv_heads": 2}),
    "few queries": ({"block_size": 16}, {"n_q": 17, "n_k": 80, "heads": 4, "kv_heads": 2, "batch": 1}),
    "paper": ({"method": "skeinformer"}, {"n_q": 65}),
    "paper, mean": ({"method": "skeinformer", "residual": "mean", "num_pilots": 20}, {"n_q": 65, "batch": 1}),
    "paper, no pilot rows": ({"method": "skeinformer", "pilot_reutilization": False}, {"n_q": 40, "batch": 1}),
    "paper, second order": ({"method": "skeinformer", "residual": "second_order"}, {"n_q": 65, "batch": 1}),
    "simple": ({"row_normalization": "simple"}, {"n_q": 65, "batch": 1}),
    "geometric in blocks": ({"residual": "geometric"}, {"n_q": 65, "batch": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_references(name, poisoned):
    settings, shapes = CASES[name]
    check(*inputs(**shapes), None, None, SkeinConfig(**{**SMALL, **settings}))


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_ragged_batches(method, poisoned):
    """Gaps, padding on either side, a sequence short enough to be exact, one valid token, and none."""
    mask = torch.rand(5, 66, device=DEVICE) < 0.8
    mask[1] = torch.arange(66, device=DEVICE) >= 20
    mask[2] = torch.arange(66, device=DEVICE) < 16
    mask[3] = torch.arange(66, device=DEVICE) == 40
    mask[4] = False
    selections = check(*inputs(66, batch=5), mask, mask, SkeinConfig(**SMALL, method=method))
    assert [s is not None for s in selections] == [True, True, False, False, False]


def test_masks_of_queries_and_keys_differ(poisoned):
    query_mask = torch.arange(40, device=DEVICE) < torch.tensor([[40], [0]], device=DEVICE)
    key_mask = torch.arange(70, device=DEVICE) < torch.tensor([[50], [70]], device=DEVICE)
    check(*inputs(40, 70), query_mask, key_mask, SkeinConfig(**SMALL))


@pytest.mark.parametrize("p", [64, 128, 256])
def test_larger_heads(p, poisoned):
    check(*inputs(30, batch=1, heads=1, p=p), None, None, SkeinConfig(**{**SMALL, "num_strata": 4}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, poisoned):
    mask = torch.arange(65, device=DEVICE) < torch.tensor([[65], [14]], device=DEVICE)
    check(*inputs(65, p=40, dtype=dtype), mask, mask, SkeinConfig(**SMALL))


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_every_loop_takes_several_steps(method, monkeypatch, poisoned):
    small = {kernel: {256: tiles.Config(16, 16, 4, 1)} for kernel in tiles.CONFIGS}
    monkeypatch.setattr(tiles, "CONFIGS", small)
    monkeypatch.setattr(exact_rows, "CHUNK", 32)
    monkeypatch.setattr(moments, "CHUNK", 32)
    mask = torch.rand(1, 55, device=DEVICE) < 0.9
    config = SkeinConfig(
        **{**SMALL, "num_columns": 20, "num_strata": 20, "method": method, "residual": "second_order"}, exact_rows=18
    )
    check(*inputs(55, batch=1, p=40), mask, mask, config)


def test_keys_that_all_columns_share_and_strata_of_columns_alone(poisoned):
    """Duplicate keys far from the others: whole strata become columns, and a key is a column of every block."""
    query, key, value = inputs(64, batch=1, heads=2, kv_heads=1)
    key[:, :, :6] = key[:, :, :1] + 4
    value[:, :, :6] *= 30
    selections = check(query, key, value, None, None, SkeinConfig(**SMALL))
    drawn = torch.cat([s.columns.flatten() for s in selections]).bincount(minlength=64)
    assert (drawn[:6] == 2 * 2).all()  # of both heads and blocks


def test_logits_of_ten_thousand_in_half_precision(poisoned):
    query, key, value = inputs(65, batch=1, p=32, dtype=torch.float16, scale=40)
    value = value / 40
    single = [x.requires_grad_() for x in (query, key, value)]
    config = SkeinConfig(**SMALL)
    layout, selection, _ = reference_selection(*(x.detach() for x in single), None, None, config, 1.0)
    output = attend(*single, layout, selection, config, 1.0, is_ragged=False)
    assert (1.0 * query.double() @ key.double().mT).abs().max() > 1e4
    for x in (output, *torch.autograd.grad(output.sum(), single)):
        assert x.isfinite().all()


@triton.jit
def kept_kernel(p_seed, p_out, rate, n_rows, N: tl.constexpr, M: tl.constexpr):
    row, o_key = tl.program_id(0), tl.arange(0, N)
    b_kept = tiles.kept(p_seed, rate, (row + tl.arange(0, 1))[:, None], o_key[None, :], M)
    tl.store(p_out + row * M + o_key[None, :], b_kept, mask=(o_key < M)[None, :])


@pytest.mark.parametrize("exact", [False, True])
def test_dropout(exact, poisoned):
    """What is dropped is a function of seed, row and key: the result is that of the weights dropped so."""
    query, key, value = inputs(40, batch=1, heads=2)
    config = SkeinConfig(**SMALL, row_normalization="simple", exact_rows=3)
    mask = torch.arange(40, device=DEVICE)[None] < (16 if exact else 40)
    layout, selection, selections = reference_selection(query, key, value, mask, mask, config, 0.3)
    seed = torch.tensor([2**40 + 5], device=DEVICE)
    factor = torch.empty(2 * 40, 40, device=DEVICE)
    kept_kernel[(2 * 40,)](seed, factor, 0.25, 80, N=64, M=40)
    assert set(factor.unique().tolist()) == {0, torch.tensor(1 / 0.75).item()}
    assert abs((factor > 0).double().mean().item() - 0.75) < 0.05
    factor = factor.view(2, 40, 40).double()
    visible = torch.zeros(2, 40, 40, dtype=torch.bool, device=DEVICE)
    if exact:
        visible[:] = mask
    else:
        blocks, columns = selections[0].blocks, selections[0].columns
        for head in range(2):
            for index, chosen in zip(blocks.index[head], columns[head], strict=True):
                visible[head, index[:, None], chosen] = True
        visible[:, :3] = True  # exact rows
    double = [x.double().requires_grad_() for x in (query, key, value)]
    weights = (0.3 * double[0][0] @ double[1][0].mT).masked_fill(~visible, -torch.inf).softmax(-1)
    expected = ((weights * factor) @ double[2][0])[None] * mask[:, None, :, None]
    probe = torch.randn_like(expected)
    single = [x.detach().requires_grad_() for x in (query, key, value)]
    output = attend(*single, layout, selection, config, 0.3, dropout=0.25, seed=seed)
    results = (output, *torch.autograd.grad((output * probe.float()).sum(), single))
    references = (expected, *torch.autograd.grad((expected * probe).sum(), double))
    for result, wanted in zip(results, references, strict=True):
        assert error(result, wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_dropout_leaves_the_residual_and_its_gradients(method):
    """At a rate that drops nothing, the path with dropout is the one without."""
    single = [x.requires_grad_() for x in inputs(65, batch=1)]
    config = SkeinConfig(**SMALL, method=method)
    layout, selection, _ = reference_selection(*(x.detach() for x in single), None, None, config, 0.2)
    probe = torch.randn(1, 2, 65, 24, device=DEVICE)
    results = []
    for dropout in (0.0, 1e-12):
        seed = torch.tensor([3], device=DEVICE)
        output = attend(*single, layout, selection, config, 0.2, False, dropout, seed)
        results.append([output, *torch.autograd.grad((output * probe).sum(), single)])
    for without, dropped in zip(*results, strict=True):
        assert error(dropped, without) < TOLERANCE[torch.float32]


def test_two_runs_agree_bit_for_bit():
    query, key, value = (x.requires_grad_() for x in inputs(65, batch=1))
    config = SkeinConfig(**SMALL)
    layout, selection, _ = reference_selection(*(x.detach() for x in (query, key, value)), None, None, config, 0.2)
    results = []
    for _ in range(2):
        output = attend(query, key, value, layout, selection, config, 0.2, False)
        results.append([output, *torch.autograd.grad(output.square().sum(), (query, key, value))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65, 127, 1000])
@pytest.mark.parametrize("block_size", [1, 32, 50])
def test_the_layout_is_the_references_rule(n, block_size):
    lengths = torch.arange(n + 1, device=DEVICE)
    mask = torch.arange(n, device=DEVICE) < lengths[:, None]
    x = torch.empty(n + 1, 1, n, 16, device=DEVICE)
    layout = ragged(mask, mask, x, x, block_size, 24, 5)
    wanted = [routing.num_blocks(i, block_size, 24) if i > 5 else 0 for i in range(n + 1)]
    assert layout.blocks.tolist() == wanted
    assert layout.key_length.tolist() == lengths.tolist()
    assert num_blocks(n, block_size, 24) == routing.num_blocks(n, block_size, 24)
    assert all(type(x) is torch.Tensor and x.dtype == torch.int32 for x in Layout(*layout))
