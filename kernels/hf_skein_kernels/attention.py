"""Attention of blocks of queries to their columns and their residual, forward and backward.

A program owns a tile of queries of one block and streams the block's keys by: first the means of the strata, which have
the logit bias `log N_c`, then the columns. With the scale `s`, `l_i = s q·k_i + log N_i` and the residual's `W`, `X`:

    z = 1 + s²/2 qᵀWq,    U = Σ_strata exp(l_c)
    output · (Σ_columns exp(l_i) + z U) = Σ_columns exp(l_i) v_i + z Σ_strata exp(l_c) v̄_c + s U Xᵀq

Keys and values are less their means here; the mean value is added at the end. Logarithms are to base 2.

Backward, with the gradient `g` of a row, `P_i = exp(l_i)` over the row's mass, `μ = g·output`, `D_i = g·v_i`,
`y = s Xg` and `u = Σ_strata P_c`:

    of l:  columns P_i (D_i - μ),  strata P_c (z (D_c - μ) + q·y);     of z: Σ_strata P_c (D_c - μ)
    of q:  s Σ (of l_i) k_i + s² (of z) Wq + u y;     of W: s²/2 (of z) q qᵀ;     of X: s u q gᵀ

`W` and `X` hold every key of the block twice, as the left factor and as the right one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout, Selection
from .residual import Residual
from .tiles import LOG2_E, config, dot, kept, load_centred, load_rows, padded, precision, softmax_step, store_rows


# --- kernels ---


@triton.jit
def block_tile(i_tile, length, blocks, BM: tl.constexpr):
    """The block of a tile of `BM` queries (at least `blocks` if there is none), and the ranks where tile and block end.

    Every block has as many tiles as the largest one.
    """
    tiles = tl.cdiv(tl.cdiv(length, tl.maximum(blocks, 1)), BM)
    i_g = i_tile // tl.maximum(tiles, 1)
    length = length.to(tl.int64)
    first = i_g * length // tl.maximum(blocks, 1)
    end = (i_g + 1) * length // tl.maximum(blocks, 1)
    return i_g, first + (i_tile - i_g * tiles) * BM, end


@triton.jit
def forward_kernel(
    p_query, p_key, p_value, p_out, p_lse, p_order, p_columns, p_key_mean, p_value_mean,
    p_mean_key, p_mean_value, p_count, p_metric, p_cross, p_query_length, p_blocks, p_seed,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, out_stride_b, out_stride_h, out_stride_n,
    n_q, n_k, H, GROUP, G, TILES, scale, rate,
    p: tl.constexpr, pv: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    SECOND_ORDER: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_tile, i_bh = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    blocks = tl.load(p_blocks + i_b)
    i_g, first_rank, end_rank = block_tile(i_tile, tl.load(p_query_length + i_b), blocks, BM)
    if i_g >= blocks:
        return
    i_kv, i_block = i_b * (H // GROUP) + i_h // GROUP, i_bh * G + i_g
    o_p, o_v = tl.arange(0, P), tl.arange(0, PV)
    m_p, m_v = o_p < p, o_v < pv
    o_rank = first_rank + tl.arange(0, BM)
    m_rank = o_rank < end_rank
    o_row = tl.load(p_order + i_bh * n_q + o_rank, mask=m_rank, other=-1)
    m_row = o_row >= 0  # other rows are exact
    # [BM, P]
    p_query += i_b * query_stride_b + i_h * query_stride_h
    b_query = load_rows(p_query, query_stride_n, o_row, m_row, o_p, m_p)
    p_key += i_b * key_stride_b + (i_h // GROUP) * key_stride_h
    p_value += i_b * value_stride_b + (i_h // GROUP) * value_stride_h
    scale_log2 = scale * LOG2_E

    b_max = tl.full([BM], -1e38, tl.float32)
    b_mass = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, PV], tl.float32)
    for first in range(0, C, BN):
        o_c = first + tl.arange(0, BN)
        # [BN, P], [BN, PV]
        b_key = load_rows(p_mean_key + i_block * C * p, p, o_c, o_c < C, o_p, m_p).to(b_query.dtype)
        b_value = load_rows(p_mean_value + i_block * C * pv, pv, o_c, o_c < C, o_v, m_v).to(b_query.dtype)
        b_bias = tl.log2(tl.load(p_count + i_block * C + o_c, mask=o_c < C, other=0.0))
        b_logit = dot(b_query, tl.trans(b_key), None, PRECISION) * scale_log2 + b_bias[None, :]
        b_weight, b_shrink, b_max, b_mass = softmax_step(b_logit, b_max, b_mass)
        b_out = dot(b_weight.to(b_query.dtype), b_value, b_out * b_shrink, PRECISION)
    if SECOND_ORDER:
        b_curvature = tl.zeros([BM], tl.float32)
        b_linear = tl.zeros([BM, PV], tl.float32)
        for first in range(0, p, BT):
            o_t = first + tl.arange(0, BT)
            # [BM, BT]
            b_part = load_rows(p_query, query_stride_n, o_row, m_row, o_t, o_t < p).to(tl.float32)
            # [P, BT], [BT, PV]
            b_metric = load_rows(p_metric + i_block * p * p, p, o_p, m_p, o_t, o_t < p)
            b_cross = load_rows(p_cross + i_block * p * pv, pv, o_t, o_t < p, o_v, m_v)
            b_curvature += tl.sum(dot(b_query.to(tl.float32), b_metric, None, PRECISION) * b_part, 1)
            b_linear = dot(b_part, b_cross, b_linear, PRECISION)
        b_z = 1.0 + tl.maximum(b_curvature, 0.0) * (scale * scale / 2)
        b_out = b_out * b_z[:, None] + b_linear * (b_mass * scale)[:, None]
        b_mass *= b_z

    for first in range(0, D, BN):
        o_d = first + tl.arange(0, BN)
        o_n = tl.load(p_columns + i_block * D + o_d, mask=o_d < D, other=0)
        # Loaded here, the means do not take registers throughout.
        b_key_mean = tl.load(p_key_mean + i_kv * p + o_p, mask=m_p, other=0.0)
        b_value_mean = tl.load(p_value_mean + i_kv * pv + o_v, mask=m_v, other=0.0)
        # [BN, P], [BN, PV]
        b_key = load_centred(p_key, key_stride_n, o_n, o_d < D, o_p, m_p, b_key_mean)
        b_value = load_centred(p_value, value_stride_n, o_n, o_d < D, o_v, m_v, b_value_mean)
        b_logit = dot(b_query, tl.trans(b_key), None, PRECISION) * scale_log2
        b_logit = tl.where((o_d < D)[None, :], b_logit, -float("inf"))
        b_weight, b_shrink, b_max, b_mass = softmax_step(b_logit, b_max, b_mass)
        if DROPOUT:
            b_weight *= kept(p_seed, rate, (i_bh * n_q + o_row)[:, None], o_n[None, :], n_k)
        b_out = dot(b_weight.to(b_query.dtype), b_value, b_out * b_shrink, PRECISION)

    b_value_mean = tl.load(p_value_mean + i_kv * pv + o_v, mask=m_v, other=0.0)
    b_out = b_out / b_mass[:, None] + b_value_mean[None, :]
    store_rows(p_out + i_b * out_stride_b + i_h * out_stride_h, out_stride_n, o_row, m_row, o_v, m_v, b_out)
    tl.store(p_lse + i_bh * n_q + o_row, b_max + tl.log2(b_mass), mask=m_row)


@triton.jit
def backward_query_kernel(
    p_query, p_key, p_value, p_out, p_grad, p_lse, p_order, p_columns, p_key_mean, p_value_mean,
    p_mean_key, p_mean_value, p_count, p_metric, p_cross, p_query_length, p_blocks, p_seed,
    p_grad_query, p_rows,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, out_stride_b, out_stride_h, out_stride_n,
    grad_stride_b, grad_stride_h, grad_stride_n, grad_query_stride_b, grad_query_stride_h, grad_query_stride_n,
    n_q, n_k, H, GROUP, G, TILES, scale, rate,
    p: tl.constexpr, pv: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    SECOND_ORDER: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries, and of every row: `μ`, `z`, `q·y`, `s² (of z)` and `s u`."""
    i_tile, i_bh = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    blocks = tl.load(p_blocks + i_b)
    i_g, first_rank, end_rank = block_tile(i_tile, tl.load(p_query_length + i_b), blocks, BM)
    if i_g >= blocks:
        return
    i_kv, i_block = i_b * (H // GROUP) + i_h // GROUP, i_bh * G + i_g
    o_p, o_v = tl.arange(0, P), tl.arange(0, PV)
    m_p, m_v = o_p < p, o_v < pv
    o_rank = first_rank + tl.arange(0, BM)
    m_rank = o_rank < end_rank
    o_row = tl.load(p_order + i_bh * n_q + o_rank, mask=m_rank, other=-1)
    m_row = o_row >= 0
    # [BM, P], [BM, PV]
    p_query += i_b * query_stride_b + i_h * query_stride_h
    p_grad += i_b * grad_stride_b + i_h * grad_stride_h
    b_query = load_rows(p_query, query_stride_n, o_row, m_row, o_p, m_p)
    b_grad = load_rows(p_grad, grad_stride_n, o_row, m_row, o_v, m_v)
    p_head = p_out + i_b * out_stride_b + i_h * out_stride_h
    b_out = load_rows(p_head, out_stride_n, o_row, m_row, o_v, m_v).to(tl.float32)
    p_key += i_b * key_stride_b + (i_h // GROUP) * key_stride_h
    p_value += i_b * value_stride_b + (i_h // GROUP) * value_stride_h
    b_key_mean = tl.load(p_key_mean + i_kv * p + o_p, mask=m_p, other=0.0)
    b_value_mean = tl.load(p_value_mean + i_kv * pv + o_v, mask=m_v, other=0.0)
    b_mu = tl.sum((b_out - b_value_mean[None, :]) * b_grad.to(tl.float32), 1)
    b_lse = tl.load(p_lse + i_bh * n_q + o_row, mask=m_row, other=float("inf"))
    scale_log2 = scale * LOG2_E

    b_z, b_share = tl.full([BM], 1.0, tl.float32), tl.zeros([BM], tl.float32)
    if SECOND_ORDER:
        b_metric, b_linear = tl.zeros([BM, P], tl.float32), tl.zeros([BM, P], tl.float32)
        for first in range(0, p, BT):
            o_t = first + tl.arange(0, BT)
            # [BM, BT], [BT, P]
            b_part = load_rows(p_query, query_stride_n, o_row, m_row, o_t, o_t < p).to(tl.float32)
            b_tile = load_rows(p_metric + i_block * p * p, p, o_t, o_t < p, o_p, m_p)
            b_metric = dot(b_part, b_tile, b_metric, PRECISION)
        for first in range(0, pv, BT):
            o_t = first + tl.arange(0, BT)
            # [BM, BT], [P, BT]
            b_part = load_rows(p_grad, grad_stride_n, o_row, m_row, o_t, o_t < pv).to(tl.float32)
            b_tile = load_rows(p_cross + i_block * p * pv, pv, o_p, m_p, o_t, o_t < pv)
            b_linear = dot(b_part, tl.trans(b_tile), b_linear, PRECISION)
        b_linear *= scale
        b_curvature = tl.sum(b_metric * b_query.to(tl.float32), 1) * (scale * scale / 2)
        b_z += tl.maximum(b_curvature, 0.0)
        b_share = tl.sum(b_linear * b_query.to(tl.float32), 1)

    b_of_z, b_u = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    b_grad_query = tl.zeros([BM, P], tl.float32)
    for first in range(0, C, BN):
        o_c = first + tl.arange(0, BN)
        # [BN, P], [BN, PV]
        b_key = load_rows(p_mean_key + i_block * C * p, p, o_c, o_c < C, o_p, m_p).to(b_query.dtype)
        b_value = load_rows(p_mean_value + i_block * C * pv, pv, o_c, o_c < C, o_v, m_v).to(b_query.dtype)
        b_bias = tl.log2(tl.load(p_count + i_block * C + o_c, mask=o_c < C, other=0.0))
        b_logit = dot(b_query, tl.trans(b_key), None, PRECISION) * scale_log2 + b_bias[None, :]
        b_weight = tl.exp2(b_logit - b_lse[:, None])
        b_of = dot(b_grad, tl.trans(b_value), None, PRECISION) - b_mu[:, None]
        b_of_z += tl.sum(b_weight * b_of, 1)
        b_u += tl.sum(b_weight, 1)
        b_of = b_weight * (b_of * b_z[:, None] + b_share[:, None])
        b_grad_query = dot(b_of.to(b_query.dtype), b_key, b_grad_query, PRECISION)

    for first in range(0, D, BN):
        o_d = first + tl.arange(0, BN)
        o_n = tl.load(p_columns + i_block * D + o_d, mask=o_d < D, other=0)
        # [BN, P], [BN, PV]
        b_key = load_centred(p_key, key_stride_n, o_n, o_d < D, o_p, m_p, b_key_mean)
        b_value = load_centred(p_value, value_stride_n, o_n, o_d < D, o_v, m_v, b_value_mean)
        b_logit = dot(b_query, tl.trans(b_key), None, PRECISION) * scale_log2
        b_weight = tl.where((o_d < D)[None, :], tl.exp2(b_logit - b_lse[:, None]), 0.0)
        b_of = dot(b_grad, tl.trans(b_value), None, PRECISION)
        if DROPOUT:
            b_of *= kept(p_seed, rate, (i_bh * n_q + o_row)[:, None], o_n[None, :], n_k)
        b_of = b_weight * (b_of - b_mu[:, None])
        b_grad_query = dot(b_of.to(b_query.dtype), b_key, b_grad_query, PRECISION)

    b_grad_query *= scale
    b_curvature = tl.where(b_z > 1.0, b_of_z, 0.0) * (scale * scale)
    if SECOND_ORDER:
        b_grad_query += b_metric * b_curvature[:, None] + b_linear * b_u[:, None]
    p_head = p_grad_query + i_b * grad_query_stride_b + i_h * grad_query_stride_h
    store_rows(p_head, grad_query_stride_n, o_row, m_row, o_p, m_p, b_grad_query)
    p_row = p_rows + (i_bh * n_q + o_row) * 5
    tl.store(p_row, b_mu, mask=m_row)
    tl.store(p_row + 1, b_z, mask=m_row)
    tl.store(p_row + 2, b_share, mask=m_row)
    tl.store(p_row + 3, b_curvature, mask=m_row)
    tl.store(p_row + 4, b_u * scale, mask=m_row)


@triton.jit
def backward_covariance_kernel(
    p_query, p_right, p_rows, p_order, p_query_length, p_key_length, p_blocks, p_out,
    query_stride_b, query_stride_h, query_stride_n, right_stride_b, right_stride_h, right_stride_n, n_q, H, G,
    p: tl.constexpr, pr: tl.constexpr, D: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`Σ_rows factor · q rightᵀ / r` of a block: twice the gradient of `rW` (`right` is the query), or that of `rX`."""
    i_g, i_bh = tl.program_id(0) % G, (tl.program_id(0) // G).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    blocks = tl.load(p_blocks + i_b)
    o_p, o_r = tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2) * BR + tl.arange(0, BR)
    b_sum = tl.zeros([BP, BR], tl.float32)
    if i_g < blocks:
        length = tl.load(p_query_length + i_b).to(tl.int64)
        end = (i_g + 1) * length // blocks
        for first in range(i_g * length // blocks, end, BM):
            o_rank = first + tl.arange(0, BM)
            o_row = tl.load(p_order + i_bh * n_q + o_rank, mask=o_rank < end, other=-1)
            m_row = o_row >= 0
            # [BM, BP], [BM, BR]
            p_head = p_query + i_b * query_stride_b + i_h * query_stride_h
            b_query = load_rows(p_head, query_stride_n, o_row, m_row, o_p, o_p < p).to(tl.float32)
            p_head = p_right + i_b * right_stride_b + i_h * right_stride_h
            b_right = load_rows(p_head, right_stride_n, o_row, m_row, o_r, o_r < pr).to(tl.float32)
            b_factor = tl.load(p_rows + (i_bh * n_q + o_row) * 5 + FACTOR, mask=m_row, other=0.0)
            b_sum = dot(tl.trans(b_query * b_factor[:, None]), b_right, b_sum, PRECISION)
        b_sum = b_sum / (tl.load(p_key_length + i_b) - D)
    # Blocks that a sequence does not have are added up, too: zeros.
    store_rows(p_out + (i_bh * G + i_g) * p * pr, pr, o_p, o_p < p, o_r, o_r < pr, b_sum)


@triton.jit
def backward_keys_kernel(
    p_query, p_key, p_value, p_grad, p_lse, p_rows, p_order, p_columns, p_stratum, p_key_mean, p_value_mean,
    p_mean_key, p_mean_value, p_count, p_grad_metric, p_grad_cross, p_grad_mean_key, p_grad_mean_value,
    p_query_length, p_blocks, p_seed, p_grad_key, p_grad_value,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, grad_stride_b, grad_stride_h, grad_stride_n,
    n_q, n_k, H, GROUP, G, scale, rate,
    p: tl.constexpr, pv: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, STRATA: tl.constexpr,
    SECOND_ORDER: tl.constexpr, GEOMETRIC: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of a block's columns, or, with STRATA, of the sums over its strata.

    A column counts in the means of its stratum with a minus, so the strata come first.
    """
    i_g, i_bh = tl.program_id(0) % G, (tl.program_id(0) // G).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    blocks = tl.load(p_blocks + i_b)
    i_kv, i_block = i_b * (H // GROUP) + i_h // GROUP, i_bh * G + i_g
    o_p, o_v = tl.arange(0, P), tl.arange(0, PV)
    m_p, m_v = o_p < p, o_v < pv
    o_i = tl.program_id(1) * BN + tl.arange(0, BN)
    n_i = C if STRATA else D
    m_i = o_i < n_i
    p_query += i_b * query_stride_b + i_h * query_stride_h
    p_grad += i_b * grad_stride_b + i_h * grad_stride_h
    p_key += i_b * key_stride_b + (i_h // GROUP) * key_stride_h
    p_value += i_b * value_stride_b + (i_h // GROUP) * value_stride_h
    b_grad_key, b_grad_value = tl.zeros([BN, P], tl.float32), tl.zeros([BN, PV], tl.float32)
    if i_g < blocks:
        scale_log2 = scale * LOG2_E
        if STRATA:
            b_count = tl.load(p_count + i_block * C + o_i, mask=m_i, other=0.0)
            b_bias = tl.log2(b_count)
            # [BN, P], [BN, PV]
            b_key32 = load_rows(p_mean_key + i_block * C * p, p, o_i, m_i, o_p, m_p)
            b_value32 = load_rows(p_mean_value + i_block * C * pv, pv, o_i, m_i, o_v, m_v)
            b_key, b_value = b_key32.to(p_query.dtype.element_ty), b_value32.to(p_query.dtype.element_ty)
        else:
            b_bias = tl.where(m_i, 0.0, -float("inf"))
            o_n = tl.load(p_columns + i_block * D + o_i, mask=m_i, other=0)
            b_mean = tl.load(p_key_mean + i_kv * p + o_p, mask=m_p, other=0.0)
            # [BN, P], [BN, PV]
            b_key = load_centred(p_key, key_stride_n, o_n, m_i, o_p, m_p, b_mean)
            b_mean = tl.load(p_value_mean + i_kv * pv + o_v, mask=m_v, other=0.0)
            b_value = load_centred(p_value, value_stride_n, o_n, m_i, o_v, m_v, b_mean)
            b_key32, b_value32 = b_key.to(tl.float32), b_value.to(tl.float32)
        length = tl.load(p_query_length + i_b).to(tl.int64)
        end = (i_g + 1) * length // blocks
        for first in range(i_g * length // blocks, end, BM):
            o_rank = first + tl.arange(0, BM)
            o_row = tl.load(p_order + i_bh * n_q + o_rank, mask=o_rank < end, other=-1)
            m_row = o_row >= 0
            # [BM, P], [BM, PV]
            b_query = load_rows(p_query, query_stride_n, o_row, m_row, o_p, m_p)
            b_grad = load_rows(p_grad, grad_stride_n, o_row, m_row, o_v, m_v)
            b_lse = tl.load(p_lse + i_bh * n_q + o_row, mask=m_row, other=float("inf"))
            p_row = p_rows + (i_bh * n_q + o_row) * 5
            b_mu = tl.load(p_row, mask=m_row, other=0.0)
            # [BN, BM]
            b_logit = dot(b_key, tl.trans(b_query), None, PRECISION) * scale_log2 + b_bias[:, None]
            b_weight = tl.exp2(b_logit - b_lse[None, :])
            b_of = dot(b_value, tl.trans(b_grad), None, PRECISION)
            if STRATA:
                b_weight_z = b_weight * tl.load(p_row + 1, mask=m_row, other=0.0)[None, :]
                b_share = tl.load(p_row + 2, mask=m_row, other=0.0)
                b_of = b_weight_z * (b_of - b_mu[None, :]) + b_weight * b_share[None, :]
                b_weight = b_weight_z
            else:
                b_keep = tl.full([BN, BM], 1.0, tl.float32)
                if DROPOUT:
                    b_keep = kept(p_seed, rate, (i_bh * n_q + o_row)[None, :], o_n[:, None], n_k)
                b_of = b_weight * (b_of * b_keep - b_mu[None, :])
                b_weight *= b_keep
            b_grad_key = dot(b_of.to(b_query.dtype), b_query, b_grad_key, PRECISION)
            b_grad_value = dot(b_weight.to(b_grad.dtype), b_grad, b_grad_value, PRECISION)
        b_grad_key *= scale

        if STRATA:
            if SECOND_ORDER:
                b_within_key, b_within_value = within_gradient(
                    p_mean_key + i_block * C * p, p, p_mean_value + i_block * C * pv, pv, o_i, m_i, p_key_mean,
                    p_value_mean, p_grad_metric + i_block * p * p, p_grad_cross + i_block * p * pv,
                    p, pv, P, PV, BN, BT, False, PRECISION,
                )  # fmt: skip
                b_grad_key -= b_within_key * b_count[:, None]
                b_grad_value -= b_within_value * b_count[:, None]
            b_size = tl.maximum(b_count, 1.0)[:, None]
            b_grad_value /= b_size
            if GEOMETRIC:  # the virtual key is the mean of the columns
                b_grad_key = -b_grad_key / D
            else:
                b_grad_key /= b_size
        else:
            if SECOND_ORDER:
                b_within_key, b_within_value = within_gradient(
                    p_key, key_stride_n, p_value, value_stride_n, o_n, m_i, p_key_mean + i_kv * p,
                    p_value_mean + i_kv * pv, p_grad_metric + i_block * p * p, p_grad_cross + i_block * p * pv,
                    p, pv, P, PV, BN, BT, True, PRECISION,
                )  # fmt: skip
                b_grad_key -= b_within_key
                b_grad_value -= b_within_value
            if C > 0:
                o_c = tl.load(p_stratum + i_kv * n_k + o_n, mask=m_i, other=0)
                # [BN, P], [BN, PV]
                b_grad_key -= load_rows(p_grad_mean_key + i_block * C * p, p, o_c, m_i, o_p, m_p)
                b_grad_value -= load_rows(p_grad_mean_value + i_block * C * pv, pv, o_c, m_i, o_v, m_v)
    store_rows(p_grad_key + i_block * n_i * p, p, o_i, m_i, o_p, m_p, b_grad_key)
    store_rows(p_grad_value + i_block * n_i * pv, pv, o_i, m_i, o_v, m_v, b_grad_value)


@triton.jit
def within_gradient(
    p_key, key_stride, p_value, value_stride, o_rows, m_rows, p_key_mean, p_value_mean, p_metric, p_cross,
    p: tl.constexpr, pv: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    CENTRED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the gradients of `Σ k kᵀ` (given twice) and `Σ k vᵀ` mean for some of the keys and values."""
    o_p, o_v = tl.arange(0, P), tl.arange(0, PV)
    b_grad_key, b_grad_value = tl.zeros([BN, P], tl.float32), tl.zeros([BN, PV], tl.float32)
    for first in range(0, p, BT):
        o_t = first + tl.arange(0, BT)
        # [BN, BT], [BT, P], [BT, PV]
        if CENTRED:
            b_mean = tl.load(p_key_mean + o_t, mask=o_t < p, other=0.0)
            b_part = load_centred(p_key, key_stride, o_rows, m_rows, o_t, o_t < p, b_mean).to(tl.float32)
        else:
            b_part = load_rows(p_key, key_stride, o_rows, m_rows, o_t, o_t < p)
        b_tile = load_rows(p_metric, p, o_t, o_t < p, o_p, o_p < p)
        b_grad_key = dot(b_part, b_tile, b_grad_key, PRECISION)
        b_tile = load_rows(p_cross, pv, o_t, o_t < p, o_v, o_v < pv)
        b_grad_value = dot(b_part, b_tile, b_grad_value, PRECISION)
    for first in range(0, pv, BT):
        o_t = first + tl.arange(0, BT)
        # [BN, BT], [P, BT]
        if CENTRED:
            b_mean = tl.load(p_value_mean + o_t, mask=o_t < pv, other=0.0)
            b_part = load_centred(p_value, value_stride, o_rows, m_rows, o_t, o_t < pv, b_mean).to(tl.float32)
        else:
            b_part = load_rows(p_value, value_stride, o_rows, m_rows, o_t, o_t < pv)
        b_tile = load_rows(p_cross, pv, o_p, o_p < p, o_t, o_t < pv)
        b_grad_key = dot(b_part, tl.trans(b_tile), b_grad_key, PRECISION)
    return b_grad_key, b_grad_value


@triton.jit
def gather_keys_kernel(
    p_key, p_value, p_exact_key, p_exact_value, p_column_key, p_column_value, p_place, p_first,
    p_stratum, p_key_mean, p_value_mean, p_metric, p_cross, p_total_key, p_total_value, p_index, p_length, p_blocks,
    p_grad_key, p_grad_value,
    key_stride_b, key_stride_h, key_stride_n, value_stride_b, value_stride_h, value_stride_n,
    grad_key_stride_b, grad_key_stride_h, grad_key_stride_n,
    grad_value_stride_b, grad_value_stride_h, grad_value_stride_n, n, HEADS, PLACES, TILES,
    p: tl.constexpr, pv: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, EXACT: tl.constexpr, SECOND_ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of keys: as columns, in one order, by their stratum, in `W` and `X`, and in exact rows."""
    i_tile, i_kv = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    i_b, i_head = i_kv // HEADS, i_kv % HEADS
    o_rank = i_tile * BN + tl.arange(0, BN)
    m_rank = o_rank < n
    o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
    m_n = o_rank < tl.load(p_length + i_b)
    o_p, o_v = tl.arange(0, P), tl.arange(0, PV)
    m_p, m_v = o_p < p, o_v < pv
    b_grad_key, b_grad_value = tl.zeros([BN, P], tl.float32), tl.zeros([BN, PV], tl.float32)
    if tl.load(p_blocks + i_b) > 0:
        if SECOND_ORDER:
            b_grad_key, b_grad_value = within_gradient(
                p_key + i_b * key_stride_b + i_head * key_stride_h, key_stride_n,
                p_value + i_b * value_stride_b + i_head * value_stride_h, value_stride_n,
                o_n, m_n, p_key_mean + i_kv * p, p_value_mean + i_kv * pv,
                p_metric + i_kv * p * p, p_cross + i_kv * p * pv, p, pv, P, PV, BN, BT, True, PRECISION,
            )  # fmt: skip
        if C > 0:
            o_c = tl.load(p_stratum + i_kv * n + o_n, mask=m_n, other=0)
            # [BN, P], [BN, PV]
            b_grad_key += load_rows(p_total_key + i_kv * C * p, p, o_c, m_n, o_p, m_p)
            b_grad_value += load_rows(p_total_value + i_kv * C * pv, pv, o_c, m_n, o_v, m_v)
        b_first = tl.load(p_first + i_kv * (n + 1) + o_n, mask=m_n, other=0)
        b_uses = tl.load(p_first + i_kv * (n + 1) + o_n + 1, mask=m_n, other=0) - b_first
        for i_use in range(0, tl.max(b_uses, 0)):
            m_use = i_use < b_uses
            o_place = tl.load(p_place + i_kv * PLACES + b_first + i_use, mask=m_use, other=0)
            # [BN, P], [BN, PV]
            b_grad_key += load_rows(p_column_key + i_kv * PLACES * p, p, o_place, m_use, o_p, m_p)
            b_grad_value += load_rows(p_column_value + i_kv * PLACES * pv, pv, o_place, m_use, o_v, m_v)
    if EXACT:
        # [BN, P], [BN, PV]
        b_grad_key += load_rows(p_exact_key + i_kv * n * p, p, o_n, m_n, o_p, m_p)
        b_grad_value += load_rows(p_exact_value + i_kv * n * pv, pv, o_n, m_n, o_v, m_v)
    p_head = p_grad_key + i_b * grad_key_stride_b + i_head * grad_key_stride_h
    store_rows(p_head, grad_key_stride_n, o_n, m_rank, o_p, m_p, b_grad_key)
    p_head = p_grad_value + i_b * grad_value_stride_b + i_head * grad_value_stride_h
    store_rows(p_head, grad_value_stride_n, o_n, m_rank, o_v, m_v, b_grad_value)


# --- launchers ---


def num_tiles(n: int, blocks: int, rows: int) -> int:
    """Most tiles of `rows` queries that the blocks of a sequence of at most `n` queries have, at most `blocks`.

    `g` blocks of `n` queries have `g ceil(ceil(n / g) / rows) <= n / rows + g` tiles.
    """
    return n // rows + blocks


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_mean: Tensor,
    selection: Selection,
    layout: Layout,
    rest: Residual,
    scale: float,
    dropout: float,
    seed: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write the rows of all blocks, but for exact rows, to `out [B, H, n_q, pv]` and `lse [B, H, n_q]`.

    `selection.order` holds `-1 - position` for exact rows. `lse` is the logarithm, to base 2, of the mass of a row.
    """
    batch, heads, n_q, p = query.shape
    pv, blocks = value.shape[-1], selection.columns.shape[2]
    c = config("forward", padded(p), padded(pv), like=query, dropout=dropout)
    tiles = num_tiles(n_q, blocks, c.rows)
    forward_kernel[(batch * heads * tiles,)](
        query, key, value, out, lse, selection.order, selection.columns, key_mean, value_mean,
        *rest, layout.query_length, layout.blocks, seed,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        n_q, key.shape[2], heads, heads // key.shape[1], blocks, tiles, scale, dropout,
        p=p, pv=pv, P=padded(p), PV=padded(pv), C=rest.count.shape[-1], D=selection.columns.shape[-1],
        BM=c.rows, BN=c.keys, BT=min(32, c.rows), SECOND_ORDER=rest.second_order, DROPOUT=dropout > 0,
        PRECISION=precision(query), num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_mean: Tensor,
    selection: Selection,
    layout: Layout,
    rest: Residual,
    geometric: bool,
    scale: float,
    dropout: float,
    seed: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    exact: tuple[Tensor, Tensor] | None,
) -> None:
    """Write the gradients of all rows but exact ones to `grad_query`, and of all keys and values to the other two.

    `exact` are the gradients of keys and values in exact rows, `[B, HK, n_k, ...]` float32, which are added.
    """
    batch, heads, n_q, p = query.shape
    kv_heads, n_k, pv = value.shape[1:]
    blocks, d, strata = *selection.columns.shape[2:], rest.count.shape[-1]
    group, bh = heads // kv_heads, batch * heads
    sizes = {"p": p, "pv": pv, "P": padded(p), "PV": padded(pv), "C": strata, "BT": 32}
    strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3]
    options = {"SECOND_ORDER": rest.second_order, "DROPOUT": dropout > 0, "PRECISION": precision(query)}

    rows = query.new_empty(batch, heads, n_q, 5, dtype=torch.float32)
    c = config("backward_query", padded(p), padded(pv), like=query, dropout=dropout)
    tiles = num_tiles(n_q, blocks, c.rows)
    backward_query_kernel[(bh * tiles,)](
        query, key, value, out, grad, lse, selection.order, selection.columns, key_mean, value_mean,
        *rest, layout.query_length, layout.blocks, seed, grad_query, rows,
        *strides, *out.stride()[:3], *grad.stride()[:3], *grad_query.stride()[:3],
        n_q, n_k, heads, group, blocks, tiles, scale, dropout,
        D=d, BM=c.rows, BN=c.keys, **sizes, **options, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip

    grad_metric, grad_cross = torch.empty_like(rest.metric), torch.empty_like(rest.cross)
    if rest.second_order:
        for right, factor, result in ((query, 3, grad_metric), (grad, 4, grad_cross)):
            pr = right.shape[-1]
            c = config("blocks", padded(p), padded(pr))
            tile = min(c.rows, padded(p)), min(64, padded(pr))
            backward_covariance_kernel[(bh * blocks, triton.cdiv(p, tile[0]), triton.cdiv(pr, tile[1]))](
                query, right, rows, selection.order, layout.query_length, layout.key_length, layout.blocks, result,
                *query.stride()[:3], *right.stride()[:3], n_q, heads, blocks,
                p=p, pr=pr, D=d, BP=tile[0], BR=tile[1], BM=c.keys, FACTOR=factor, PRECISION=precision(query),
                num_warps=c.warps, num_stages=c.stages,
            )  # fmt: skip

    grad_means = torch.empty_like(rest.key), torch.empty_like(rest.value)
    grad_columns = tuple(query.new_empty(*selection.columns.shape, x, dtype=torch.float32) for x in (p, pv))
    c = config("backward_keys", padded(p), padded(pv), like=query, dropout=dropout)
    for is_strata, count, result in ((True, strata, grad_means), (False, d, grad_columns)):
        if count == 0:
            continue
        backward_keys_kernel[(bh * blocks, triton.cdiv(count, c.rows))](
            query, key, value, grad, lse, rows, selection.order, selection.columns, selection.stratum,
            key_mean, value_mean, rest.key, rest.value, rest.count, grad_metric, grad_cross, *grad_means,
            layout.query_length, layout.blocks, seed, *result,
            *strides, *grad.stride()[:3], n_q, n_k, heads, group, blocks, scale, dropout,
            D=d, BM=c.keys, BN=c.rows, STRATA=is_strata, GEOMETRIC=geometric, **sizes, **options,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip

    def over_blocks(x: Tensor) -> Tensor:  # [B, H, G, ...] to [B, HK, ...], in one order
        return x.unflatten(1, (kv_heads, group)).flatten(2, 3).sum(2)

    total_key, total_value = (over_blocks(x) for x in grad_means)
    if geometric:
        total_key.zero_()
    place, first = _uses(selection.columns, layout.blocks, kv_heads, n_k)
    tiles = triton.cdiv(n_k, c.rows)
    gather_keys_kernel[(tiles * batch * kv_heads,)](
        key, value, *(exact or grad_columns), *grad_columns, place, first,
        selection.stratum, key_mean, value_mean, over_blocks(grad_metric), over_blocks(grad_cross),
        total_key, total_value, layout.key_index, layout.key_length, layout.blocks,
        grad_key, grad_value, *key.stride()[:3], *value.stride()[:3], *grad_key.stride()[:3], *grad_value.stride()[:3],
        n_k, kv_heads, place.shape[-1], tiles,
        BN=c.rows, EXACT=exact is not None, SECOND_ORDER=rest.second_order, PRECISION=precision(query), **sizes,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


def _uses(columns: Tensor, blocks: Tensor, kv_heads: int, n_k: int) -> tuple[Tensor, Tensor]:
    """The selection transposed: for every key the places in `columns` where it stands, in one order.

    Args:
        columns: `[B, H, G, d]` int32.
        blocks: `[B]` int32, how many of the `G` a sequence has.
        kv_heads: Heads of keys, which the heads of a group share.
        n_k: Number of keys.

    Returns:
        `[B, HK, group * G * d]` places within the columns of a group, key by key, and `[B, HK, n_k + 1]` where each
        key's begin; both int32.
    """
    batch, _, most, _ = columns.shape
    used = torch.arange(most, device=columns.device) < blocks[:, None]
    keys = torch.where(used[:, None, :, None], columns, n_k).reshape(batch, kv_heads, -1)
    keys, place = keys.sort(dim=-1, stable=True)
    bounds = torch.arange(n_k + 1, device=columns.device, dtype=torch.int32).expand(batch, kv_heads, -1)
    return place.int(), torch.searchsorted(keys, bounds.contiguous(), out_int32=True)
