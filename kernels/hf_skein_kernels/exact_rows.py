"""Exact attention: the listed rows of sequences that are sketched, and all rows of sequences that are not.

Few rows over many keys are cut into chunks of keys, whose results are then combined.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout, Selection
from .moments import add_parts, room_for_parts
from .tiles import LOG2_E, config, dot, kept, load_rows, padded, precision, softmax_step, store_rows


CHUNK = 1024  # keys


# --- kernels ---


@triton.jit
def exact_tile(i_tile, i_bh, i_b, p_exact_rows, p_query_index, p_query_length, p_blocks, R, n_q,
               BM: tl.constexpr, LISTED: tl.constexpr, FIRST: tl.constexpr):  # fmt: skip
    """A tile of query positions `[BM]`, -1 where there is none, and whether it holds any."""
    o_m = i_tile * BM + tl.arange(0, BM)
    blocks = tl.load(p_blocks + i_b)
    length = tl.load(p_query_length + i_b)
    if LISTED:
        is_used = blocks > 0
        if FIRST:
            o_row = tl.load(p_query_index + i_b * n_q + o_m, mask=o_m < tl.minimum(R, length), other=-1)
        else:
            o_row = tl.load(p_exact_rows + i_bh * R + o_m, mask=o_m < R, other=-1)
    else:
        is_used = (blocks == 0) & (i_tile * BM < length)
        o_row = tl.load(p_query_index + i_b * n_q + o_m, mask=o_m < length, other=-1)
    return o_row, is_used


@triton.jit
def forward_kernel(
    p_query, p_key, p_value, p_out, p_lse, p_exact_rows, p_query_index, p_query_length, p_key_index, p_key_length,
    p_blocks, p_seed, p_key_mean, p_value_mean,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, out_stride_b, out_stride_h, out_stride_n,
    n_q, n_k, H, GROUP, R, TILES, CHUNKS, CHUNK, PART, scale, rate,
    p: tl.constexpr, pv: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LISTED: tl.constexpr, FIRST: tl.constexpr, MEANS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows over a chunk of keys: to the output, or, if LISTED, to `[B, H, CHUNKS, R, pv]` for `combine_kernel`.

    The listed rows may be the FIRST valid queries. With MEANS also what a chunk gives to the means of keys and values.
    """
    i_tile, i_chunk = tl.program_id(0) % TILES, tl.program_id(0) // TILES % CHUNKS
    i_bh = (tl.program_id(0) // TILES // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_row, is_used = exact_tile(
        i_tile, i_bh, i_b, p_exact_rows, p_query_index, p_query_length, p_blocks, R, n_q, BM, LISTED, FIRST
    )
    if not LISTED:  # noqa: SIM102 -- known when compiled
        if not is_used:
            return
    m_row = o_row >= 0
    o_p, o_v = tl.arange(0, P), tl.arange(0, PV)
    m_p, m_v = o_p < p, o_v < pv
    # [BM, P]
    p_query += i_b * query_stride_b + i_h * query_stride_h
    p_key += i_b * key_stride_b + (i_h // GROUP) * key_stride_h
    p_value += i_b * value_stride_b + (i_h // GROUP) * value_stride_h
    b_query = load_rows(p_query, query_stride_n, o_row, m_row, o_p, m_p)
    b_max = tl.full([BM], -1e38, tl.float32)
    b_mass = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, PV], tl.float32)
    gives_means = MEANS & (i_tile == 0) & (i_h % GROUP == 0)
    length = tl.where(is_used & (gives_means | (not MEANS) | (R > 0)), tl.load(p_key_length + i_b), 0)
    end = tl.minimum(i_chunk * CHUNK + CHUNK, length)
    b_key_sum, b_value_sum = tl.zeros([P], tl.float32), tl.zeros([PV], tl.float32)
    for first in range(i_chunk * CHUNK, end, BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < end
        o_n = tl.load(p_key_index + i_b * n_k + o_rank, mask=m_rank, other=0)
        # [BN, P], [BN, PV]
        b_key = load_rows(p_key, key_stride_n, o_n, m_rank, o_p, m_p)
        b_value = load_rows(p_value, value_stride_n, o_n, m_rank, o_v, m_v)
        if MEANS:  # noqa: SIM102
            if gives_means:
                b_key_sum += tl.sum(b_key.to(tl.float32), 0)
                b_value_sum += tl.sum(b_value.to(tl.float32), 0)
        b_logit = dot(b_query, tl.trans(b_key), None, PRECISION) * (scale * LOG2_E)
        b_logit = tl.where(m_rank[None, :], b_logit, -float("inf"))
        b_weight, b_shrink, b_max, b_mass = softmax_step(b_logit, b_max, b_mass)
        if DROPOUT:
            b_weight *= kept(p_seed, rate, (i_bh * n_q + o_row)[:, None], o_n[None, :], n_k)
        b_out = dot(b_weight.to(b_query.dtype), b_value, b_out * b_shrink, PRECISION)
    b_out = tl.where(b_mass[:, None] > 0, b_out / b_mass[:, None], 0.0)
    b_lse = b_max + tl.log2(b_mass)
    if LISTED:
        o_m = i_tile * BM + tl.arange(0, BM)
        i_part = i_bh * CHUNKS + i_chunk
        store_rows(p_out + i_part * R * pv, pv, o_m, o_m < R, o_v, m_v, b_out)
        tl.store(p_lse + i_part * R + o_m, b_lse, mask=o_m < R)
    else:
        store_rows(p_out + i_b * out_stride_b + i_h * out_stride_h, out_stride_n, o_row, m_row, o_v, m_v, b_out)
        tl.store(p_lse + i_bh * n_q + o_row, b_lse, mask=m_row)
    if MEANS:  # noqa: SIM102
        if gives_means:
            i_kv, size = i_bh // GROUP, tl.maximum(length, 1).to(tl.float32)  # H is GROUP times the key heads
            p_part = p_key_mean + i_chunk.to(tl.int64) * PART + i_kv * p
            tl.store(p_part + o_p, b_key_sum / size, mask=m_p)
            p_part = p_value_mean + i_chunk.to(tl.int64) * PART + i_kv * pv
            tl.store(p_part + o_v, b_value_sum / size, mask=m_v)


@triton.jit
def combine_kernel(
    p_part, p_part_lse, p_exact_rows, p_blocks, p_out, p_lse, out_stride_b, out_stride_h, out_stride_n,
    n_q, H, R, CHUNKS, p: tl.constexpr, P: tl.constexpr, WEIGHTED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """One listed row, from its parts `[B, H, CHUNKS, R, p]`: their mean by mass, or (not WEIGHTED) their sum.

    To its position among all queries if it is to be PLACED; else to its place in the list, zeros for sequences that are
    not sketched.
    """
    i_r, i_bh = tl.program_id(0) % R, (tl.program_id(0) // R).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    row, is_sketched = i_r, tl.load(p_blocks + i_b) > 0
    is_stored = True
    if PLACED:
        row = tl.load(p_exact_rows + i_bh * R + i_r)
        is_stored = is_sketched & (row >= 0)
    if is_stored:
        o_p = tl.arange(0, P)
        b_max, b_mass = -1e38, 0.0
        b_out = tl.zeros([P], tl.float32)
        for i_chunk in range(0, tl.where(is_sketched, CHUNKS, 0)):
            i_part = (i_bh * CHUNKS + i_chunk) * R + i_r
            b_part = tl.load(p_part + i_part * p + o_p, mask=o_p < p, other=0.0)
            if WEIGHTED:
                b_lse = tl.load(p_part_lse + i_part)
                b_new_max = tl.maximum(b_max, b_lse)
                b_weight, b_shrink = tl.exp2(b_lse - b_new_max), tl.exp2(b_max - b_new_max)
                b_mass = b_mass * b_shrink + b_weight
                b_out = b_out * b_shrink + b_part * b_weight
                b_max = b_new_max
            else:
                b_out += b_part
        if WEIGHTED:
            b_mass = tl.where(is_sketched, b_mass, 1.0)
            b_out /= b_mass
            tl.store(p_lse + i_bh * n_q + row, tl.where(is_sketched, b_max + tl.log2(b_mass), 0.0))
        p_row = p_out + i_b * out_stride_b + i_h * out_stride_h + row.to(tl.int64) * out_stride_n
        tl.store(p_row + o_p, b_out.to(p_out.dtype.element_ty), mask=o_p < p)


@triton.jit
def backward_query_kernel(
    p_query, p_key, p_value, p_out, p_grad, p_lse, p_mu, p_exact_rows, p_query_index, p_query_length, p_key_index,
    p_key_length, p_blocks, p_seed, p_grad_query,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, out_stride_b, out_stride_h, out_stride_n,
    grad_stride_b, grad_stride_h, grad_stride_n, grad_query_stride_b, grad_query_stride_h, grad_query_stride_n,
    n_q, n_k, H, GROUP, R, TILES, CHUNKS, CHUNK, scale, rate,
    p: tl.constexpr, pv: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LISTED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, to its place or (LISTED) to parts as in `forward_kernel`; and `μ = grad·output`."""
    i_tile, i_chunk = tl.program_id(0) % TILES, tl.program_id(0) // TILES % CHUNKS
    i_bh = (tl.program_id(0) // TILES // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_row, is_used = exact_tile(
        i_tile, i_bh, i_b, p_exact_rows, p_query_index, p_query_length, p_blocks, R, n_q, BM, LISTED, False
    )
    if not is_used:
        return
    m_row = o_row >= 0
    o_p, o_v = tl.arange(0, P), tl.arange(0, PV)
    m_p, m_v = o_p < p, o_v < pv
    # [BM, P], [BM, PV]
    p_query += i_b * query_stride_b + i_h * query_stride_h
    p_key += i_b * key_stride_b + (i_h // GROUP) * key_stride_h
    p_value += i_b * value_stride_b + (i_h // GROUP) * value_stride_h
    b_query = load_rows(p_query, query_stride_n, o_row, m_row, o_p, m_p)
    p_head = p_grad + i_b * grad_stride_b + i_h * grad_stride_h
    b_grad = load_rows(p_head, grad_stride_n, o_row, m_row, o_v, m_v)
    p_head = p_out + i_b * out_stride_b + i_h * out_stride_h
    b_out = load_rows(p_head, out_stride_n, o_row, m_row, o_v, m_v)
    b_mu = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    tl.store(p_mu + i_bh * n_q + o_row, b_mu, mask=m_row)  # every chunk writes the same
    b_lse = tl.load(p_lse + i_bh * n_q + o_row, mask=m_row, other=float("inf"))
    b_grad_query = tl.zeros([BM, P], tl.float32)
    end = tl.minimum(i_chunk * CHUNK + CHUNK, tl.load(p_key_length + i_b))
    for first in range(i_chunk * CHUNK, end, BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < end
        o_n = tl.load(p_key_index + i_b * n_k + o_rank, mask=m_rank, other=0)
        # [BN, P], [BN, PV]
        b_key = load_rows(p_key, key_stride_n, o_n, m_rank, o_p, m_p)
        b_value = load_rows(p_value, value_stride_n, o_n, m_rank, o_v, m_v)
        b_logit = dot(b_query, tl.trans(b_key), None, PRECISION) * (scale * LOG2_E)
        b_weight = tl.where(m_rank[None, :], tl.exp2(b_logit - b_lse[:, None]), 0.0)
        b_of = dot(b_grad, tl.trans(b_value), None, PRECISION)
        if DROPOUT:
            b_of *= kept(p_seed, rate, (i_bh * n_q + o_row)[:, None], o_n[None, :], n_k)
        b_of = b_weight * (b_of - b_mu[:, None])
        b_grad_query = dot(b_of.to(b_query.dtype), b_key, b_grad_query, PRECISION)
    b_grad_query *= scale
    if LISTED:
        o_m = i_tile * BM + tl.arange(0, BM)
        p_part = p_grad_query + (i_bh * CHUNKS + i_chunk) * R * p
        store_rows(p_part, p, o_m, o_m < R, o_p, m_p, b_grad_query)
    else:
        p_head = p_grad_query + i_b * grad_query_stride_b + i_h * grad_query_stride_h
        store_rows(p_head, grad_query_stride_n, o_row, m_row, o_p, m_p, b_grad_query)


@triton.jit
def backward_keys_kernel(
    p_query, p_key, p_value, p_grad, p_lse, p_mu, p_exact_rows, p_query_index, p_query_length, p_key_index,
    p_key_length, p_blocks, p_seed, p_grad_key, p_grad_value,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, grad_stride_b, grad_stride_h, grad_stride_n,
    n_q, n_k, H, GROUP, R, TILES, scale, rate,
    p: tl.constexpr, pv: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of valid keys, over the exact rows of all heads of its group."""
    i_tile, i_kv = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    i_b, i_head = i_kv // (H // GROUP), i_kv % (H // GROUP)
    o_rank = i_tile * BN + tl.arange(0, BN)
    key_length = tl.load(p_key_length + i_b)
    if i_tile * BN >= key_length:
        return
    m_n = o_rank < key_length
    o_n = tl.load(p_key_index + i_b * n_k + o_rank, mask=m_n, other=0)
    o_p, o_v = tl.arange(0, P), tl.arange(0, PV)
    m_p, m_v = o_p < p, o_v < pv
    # [BN, P], [BN, PV]
    b_key = load_rows(p_key + i_b * key_stride_b + i_head * key_stride_h, key_stride_n, o_n, m_n, o_p, m_p)
    p_head = p_value + i_b * value_stride_b + i_head * value_stride_h
    b_value = load_rows(p_head, value_stride_n, o_n, m_n, o_v, m_v)
    b_grad_key, b_grad_value = tl.zeros([BN, P], tl.float32), tl.zeros([BN, PV], tl.float32)
    is_listed = tl.load(p_blocks + i_b) > 0
    listed = tl.where(is_listed, R, 0)
    unlisted = tl.where(is_listed, 0, tl.load(p_query_length + i_b))
    for i_step in range(0, GROUP * tl.cdiv(listed + unlisted, BM)):
        i_h = i_head * GROUP + i_step % GROUP
        i_bh = i_b * H + i_h
        o_m = i_step // GROUP * BM + tl.arange(0, BM)
        # One of the two is empty.
        b_listed = tl.load(p_exact_rows + i_bh * R + o_m, mask=o_m < listed, other=-1)
        b_unlisted = tl.load(p_query_index + i_b * n_q + o_m, mask=o_m < unlisted, other=-1)
        o_row = tl.maximum(b_listed, b_unlisted)
        m_row = o_row >= 0
        # [BM, P], [BM, PV]
        p_head = p_query + i_b * query_stride_b + i_h * query_stride_h
        b_query = load_rows(p_head, query_stride_n, o_row, m_row, o_p, m_p)
        p_head = p_grad + i_b * grad_stride_b + i_h * grad_stride_h
        b_grad = load_rows(p_head, grad_stride_n, o_row, m_row, o_v, m_v)
        b_lse = tl.load(p_lse + i_bh * n_q + o_row, mask=m_row, other=float("inf"))
        b_mu = tl.load(p_mu + i_bh * n_q + o_row, mask=m_row, other=0.0)
        # [BN, BM]
        b_logit = dot(b_key, tl.trans(b_query), None, PRECISION) * (scale * LOG2_E)
        b_weight = tl.exp2(b_logit - b_lse[None, :])
        b_of = dot(b_value, tl.trans(b_grad), None, PRECISION)
        b_keep = tl.full([BN, BM], 1.0, tl.float32)
        if DROPOUT:
            b_keep = kept(p_seed, rate, (i_bh * n_q + o_row)[None, :], o_n[:, None], n_k)
        b_of = b_weight * (b_of * b_keep - b_mu[None, :])
        b_grad_key = dot(b_of.to(b_query.dtype), b_query, b_grad_key, PRECISION)
        b_grad_value = dot((b_weight * b_keep).to(b_grad.dtype), b_grad, b_grad_value, PRECISION)
    store_rows(p_grad_key + i_kv * n_k * p, p, o_n, m_n, o_p, m_p, b_grad_key * scale)
    store_rows(p_grad_value + i_kv * n_k * pv, pv, o_n, m_n, o_v, m_v, b_grad_value)


# --- launchers ---


def rows_and_means(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor | int, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact attention of some rows, and the means of keys and values, in one pass over them.

    Args:
        query: `[B, H, n_q, p]`, last stride 1.
        key: `[B, HK, n_k, p]`, last stride 1.
        value: `[B, HK, n_k, pv]`, last stride 1.
        rows: `[B, H, R]` int32 contiguous, positions of queries; or how many of the first valid ones.
        layout: Of the batch.
        scale: Multiplies the logits.

    Returns:
        The means `[B, HK, p]` and `[B, HK, pv]`; the rows `[B, H, R, pv]` and the logarithm to base 2 of their mass
        `[B, H, R]`, undefined where there is no such query. All float32, and zeros for sequences that are not sketched.
    """
    batch, kv_heads, n_k, pv = value.shape
    first = isinstance(rows, int)
    if first:
        rows = layout.query_index[:, None, : min(rows, query.shape[2])].expand(-1, query.shape[1], -1)
    sizes = [(batch, kv_heads, query.shape[-1]), (batch, kv_heads, pv)]
    parts, views = room_for_parts(key, triton.cdiv(n_k, CHUNK), sizes)
    part, part_lse = _forward(
        query, key, value, rows, layout, scale, 0.0, layout.blocks, None, first, (*views(parts[0]), parts.shape[1])
    )
    key_mean, value_mean = views(add_parts(parts))
    out, lse = part.new_empty(*rows.shape, pv), part.new_empty(rows.shape)
    if rows.shape[-1]:
        _combine(part, part_lse, rows, layout, out, lse, placed=False)
    return key_mean, value_mean.clone(), out, lse  # results of an operator share no memory


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    layout: Layout,
    ragged: bool,
    scale: float,
    dropout: float,
    seed: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write exact rows to `out [B, H, n_q, pv]` and `lse [B, H, n_q]` (to base 2).

    Rows that came with the selection are not computed again, unless weights are dropped.

    Args:
        query: `[B, H, n_q, p]`, last stride 1; likewise keys and values.
        key: `[B, HK, n_k, p]`.
        value: `[B, HK, n_k, pv]`.
        selection: Its exact rows `[B, H, R]` are those of sequences that are sketched.
        layout: Of the batch.
        ragged: Whether there may be sequences that are not sketched.
        scale: Multiplies the logits.
        dropout: Probability of dropping a weight.
        seed: Of the dropout, one integer.
        out: Written to.
        lse: Written to.
    """
    exact_rows = selection.exact_rows
    if exact_rows.shape[-1]:
        if selection.exact_lse.shape[-1] and not dropout:
            part, part_lse = selection.exact_output[:, :, None], selection.exact_lse[:, :, None]
        else:
            part, part_lse = _forward(query, key, value, exact_rows, layout, scale, dropout, seed, None)
        _combine(part, part_lse, exact_rows, layout, out, lse)
    if ragged:
        _forward(query, key, value, exact_rows, layout, scale, dropout, seed, (out, lse))


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    exact_rows: Tensor,
    layout: Layout,
    ragged: bool,
    scale: float,
    dropout: float,
    seed: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_query: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Write the gradients of exact rows to `grad_query`; return those of keys and values, `[B, HK, n_k, ...]` float32.

    None if there is no exact row. Rows of the result that are padding are undefined. Arguments as in `forward`.
    """
    launches = _launches(exact_rows, query, key, ragged)
    if not launches:
        return None
    mu = torch.empty_like(lse)
    for listed, rows, chunk in launches:
        chunks, common, options = _arguments(query, key, value, layout, exact_rows, listed, rows, chunk, dropout)
        part = query.new_empty(*exact_rows.shape[:2], chunks, rows, query.shape[-1], dtype=torch.float32)
        backward_query_kernel[(query.shape[0] * query.shape[1] * common[5] * chunks,)](
            query, key, value, out, grad, lse, mu, exact_rows,
            layout.query_index, layout.query_length, layout.key_index, layout.key_length, layout.blocks, seed,
            part if listed else grad_query,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            *grad.stride()[:3], *grad_query.stride()[:3], *common, scale, dropout, **options,
        )  # fmt: skip
        if listed:
            _combine(part, None, exact_rows, layout, grad_query, None)
    batch, heads, n_q, p = query.shape
    kv_heads, n_k, pv = value.shape[1:]
    grads = tuple(query.new_empty(batch, kv_heads, n_k, x, dtype=torch.float32) for x in (p, pv))
    c = config("exact_keys", padded(p), padded(pv), like=query, dropout=dropout)
    tiles = triton.cdiv(n_k, c.rows)
    backward_keys_kernel[(tiles * batch * kv_heads,)](
        query, key, value, grad, lse, mu, exact_rows,
        layout.query_index, layout.query_length, layout.key_index, layout.key_length, layout.blocks, seed, *grads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3],
        n_q, n_k, heads, heads // kv_heads, exact_rows.shape[-1], tiles, scale, dropout,
        p=p, pv=pv, P=padded(p), PV=padded(pv), BM=c.keys, BN=c.rows, DROPOUT=dropout > 0,
        PRECISION=precision(query), num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return grads


def _forward(
    query,
    key,
    value,
    exact_rows,
    layout: Layout,
    scale: float,
    dropout: float,
    seed,
    results: tuple | None,
    first: bool = False,
    means: tuple | None = None,
) -> tuple[Tensor, Tensor]:
    """All rows of what is not sketched, to `results`; or, if that is None, listed rows over chunks of keys.

    `means` is room for the parts of both means, of the first chunk, and how far apart chunks are.
    """
    listed = results is None
    rows, chunk = (exact_rows.shape[-1], CHUNK) if listed else (query.shape[2], key.shape[2])
    chunks, common, options = _arguments(query, key, value, layout, exact_rows, listed, rows, chunk, dropout)
    if listed:
        part = query.new_empty(*exact_rows.shape[:2], chunks, rows, value.shape[-1], dtype=torch.float32)
        results = part, part.new_empty(part.shape[:-1])
    forward_kernel[(query.shape[0] * query.shape[1] * common[5] * chunks,)](
        query, key, value, *results, exact_rows,
        layout.query_index, layout.query_length, layout.key_index, layout.key_length, layout.blocks, seed,
        *(means or (*results, 0))[:2],
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *results[0].stride()[:3],
        *common, means[2] if means else 0, scale, dropout, FIRST=first, MEANS=means is not None, **options,
    )  # fmt: skip
    return results


def _launches(exact_rows: Tensor, query: Tensor, key: Tensor, ragged: bool) -> list[tuple[bool, int, int]]:
    """Whether rows are listed, how many there are, and how many keys a chunk has."""
    listed = [(True, exact_rows.shape[-1], CHUNK)] if exact_rows.shape[-1] else []
    return listed + ([(False, query.shape[2], key.shape[2])] if ragged else [])


def _arguments(query, key, value, layout, exact_rows, listed: bool, rows: int, chunk: int, dropout: float):
    """The number of chunks, and what the kernels that own rows have in common."""
    heads, p, pv = query.shape[1], query.shape[-1], value.shape[-1]
    c = config("exact", padded(p), padded(pv), like=query, dropout=dropout)
    tile = min(c.rows, padded(rows))
    chunks = triton.cdiv(key.shape[2], chunk)
    numbers = (
        query.shape[2], key.shape[2], heads, heads // key.shape[1], exact_rows.shape[-1],
        max(1, triton.cdiv(rows, tile)), chunks, chunk,
    )  # fmt: skip
    options = {
        "p": p, "pv": pv, "P": padded(p), "PV": padded(pv), "BM": tile, "BN": c.keys, "LISTED": listed,
        "DROPOUT": dropout > 0, "PRECISION": precision(query), "num_warps": c.warps, "num_stages": c.stages,
    }  # fmt: skip
    return chunks, numbers, options


def _combine(
    part: Tensor,
    part_lse: Tensor | None,
    exact_rows,
    layout: Layout,
    out: Tensor,
    lse: Tensor | None,
    placed: bool = True,
) -> None:
    batch, heads, chunks, rows, p = part.shape
    combine_kernel[(batch * heads * rows,)](
        part, part if part_lse is None else part_lse, exact_rows, layout.blocks, out, part if lse is None else lse,
        *out.stride()[:3], out.shape[2], heads, rows, chunks,
        p=p, P=padded(p), WEIGHTED=part_lse is not None, PLACED=placed, num_warps=1,
    )  # fmt: skip
