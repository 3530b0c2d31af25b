"""What stands for the keys of a block that are not its columns: means per stratum and covariances within strata.

With `S_c`, `N_c` the sum and size of stratum `c`, and sums over all keys `A = Σ_j k_j [k_j, v_j]ᵀ` (see `moments`):

    k̄_c = (S_c - Σ_{columns in c} k) / (N_c - #columns in c)        likewise v̄_c
    [W, X] = (A - Σ_columns k [k, v]ᵀ - Σ_c N_c k̄_c [k̄_c, v̄_c]ᵀ) / r    with r the number of keys without columns
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import moments
from .layout import Layout, Selection
from .tiles import config, dot, load_centred, load_rows, padded, precision, store_rows


class Residual(NamedTuple):
    """The residual of every block, all float32. Undefined for blocks that a sequence does not have.

    Attributes:
        key: `[B, H, G, C, p]`, means of the strata, less the mean key.
        value: `[B, H, G, C, pv]`, likewise.
        count: `[B, H, G, C]`, how many keys a mean stands for.
        metric: `[B, H, G, p, p]`, the covariance `W` of keys within strata; empty unless it is of second order.
        cross: `[B, H, G, p, pv]`, the covariance `X` of keys and values; likewise.
    """

    key: Tensor
    value: Tensor
    count: Tensor
    metric: Tensor
    cross: Tensor

    @property
    def second_order(self) -> bool:
        return self.metric.numel() > 0


# --- kernels ---


@triton.jit
def mean_without(
    b_sum, b_count, b_size, p_total, p_mean, b_centre, o_c, m_c, o_p, m_p, p: tl.constexpr, SUMMED: tl.constexpr
):
    """Means `[C, P]` of some strata without the columns `b_sum [C, P]`; `b_count [C]` keys are left.

    If nothing was SUMMED, there is one stratum of `b_size` keys, whose sum follows from the mean.
    """
    if SUMMED:
        b_total = load_rows(p_total, p, o_c, m_c, o_p, m_p)
    else:
        b_mean = tl.load(p_mean + o_p, mask=m_p, other=0.0)
        b_total = b_size[:, None] * (b_mean - b_centre)[None, :]
    return tl.where(b_count[:, None] > 0, b_total - b_sum, 0.0) / tl.maximum(b_count, 1.0)[:, None]


@triton.jit
def block_kernel(
    p_key, p_value, p_key_mean, p_value_mean, p_key_centre, p_value_centre, p_key_total, p_value_total, p_size,
    p_metric_total, p_cross_total, p_columns, p_stratum, p_length, p_blocks,
    p_mean_key, p_mean_value, p_count, p_metric, p_cross,
    key_stride_b, key_stride_h, key_stride_n, value_stride_b, value_stride_h, value_stride_n, n, H, GROUP, G,
    p: tl.constexpr, pv: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    BV: tl.constexpr, BN: tl.constexpr, SECOND_ORDER: tl.constexpr, GEOMETRIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The residual of one block: some columns of its means and, of second order, a tile of `W` and one of `X`.

    With GEOMETRIC the mean key is that of the columns.
    """
    i_g, i_bh = tl.program_id(0) % G, (tl.program_id(0) // G).to(tl.int64)
    i_b, i_kv = i_bh // H, i_bh // H * (H // GROUP) + i_bh % H // GROUP
    if i_g >= tl.load(p_blocks + i_b):
        return
    i_head, i_block, length = i_kv % (H // GROUP), i_bh * G + i_g, tl.load(p_length + i_b)
    p_key += i_b * key_stride_b + i_head * key_stride_h
    p_value += i_b * value_stride_b + i_head * value_stride_h
    o_row = tl.program_id(1) * BP + tl.arange(0, BP)
    o_p, o_v = tl.program_id(2) * BP + tl.arange(0, BP), tl.program_id(2) * BV + tl.arange(0, BV)
    m_row, m_p, m_v = o_row < p, o_p < p, o_v < pv
    b_row_centre = tl.load(p_key_centre + i_kv * p + o_row, mask=m_row, other=0.0)
    b_key_centre = tl.load(p_key_centre + i_kv * p + o_p, mask=m_p, other=0.0)
    b_value_centre = tl.load(p_value_centre + i_kv * pv + o_v, mask=m_v, other=0.0)

    b_metric, b_cross = tl.zeros([BP, BP], tl.float32), tl.zeros([BP, BV], tl.float32)
    if SECOND_ORDER:
        for first in range(0, D, BN):
            o_d = first + tl.arange(0, BN)
            o_n = tl.load(p_columns + i_block * D + o_d, mask=o_d < D, other=0)
            # [BN, BP], [BN, BP], [BN, BV]
            b_row = load_centred(p_key, key_stride_n, o_n, o_d < D, o_row, m_row, b_row_centre)
            b_key = load_centred(p_key, key_stride_n, o_n, o_d < D, o_p, m_p, b_key_centre)
            b_value = load_centred(p_value, value_stride_n, o_n, o_d < D, o_v, m_v, b_value_centre)
            b_metric = dot(tl.trans(b_row), b_key, b_metric, PRECISION)
            b_cross = dot(tl.trans(b_row), b_value, b_cross, PRECISION)

    for first_c in range(0, C, BC):
        o_c = first_c + tl.arange(0, BC)
        m_c = o_c < C
        b_row_sum, b_key_sum = tl.zeros([BC, BP], tl.float32), tl.zeros([BC, BP], tl.float32)
        b_value_sum, b_drawn = tl.zeros([BC, BV], tl.float32), tl.zeros([BC], tl.float32)
        for first in range(0, D, BN):
            o_d = first + tl.arange(0, BN)
            o_n = tl.load(p_columns + i_block * D + o_d, mask=o_d < D, other=0)
            b_stratum = tl.load(p_stratum + i_kv * n + o_n, mask=o_d < D, other=-1)
            b_member = (b_stratum[None, :] == o_c[:, None]).to(tl.float32)  # [BC, BN]
            b_drawn += tl.sum(b_member, 1)
            b_member = b_member.to(p_key.dtype.element_ty)
            # [BN, BP], [BN, BV]
            b_key = load_centred(p_key, key_stride_n, o_n, o_d < D, o_p, m_p, b_key_centre)
            b_value = load_centred(p_value, value_stride_n, o_n, o_d < D, o_v, m_v, b_value_centre)
            b_key_sum = dot(b_member, b_key, b_key_sum, PRECISION)
            b_value_sum = dot(b_member, b_value, b_value_sum, PRECISION)
            if SECOND_ORDER:
                b_row = load_centred(p_key, key_stride_n, o_n, o_d < D, o_row, m_row, b_row_centre)
                b_row_sum = dot(b_member, b_row, b_row_sum, PRECISION)
        if SECOND_ORDER:
            b_size = tl.load(p_size + i_kv * C + o_c, mask=m_c, other=0.0)
        else:
            b_size = tl.where(m_c, length, 0).to(tl.float32)
        b_count = b_size - b_drawn
        p_total = p_key_total + i_kv * C * p
        # [BC, BP], [BC, BV]
        if GEOMETRIC:
            b_key_mean = b_key_sum / D
        else:
            b_key_mean = mean_without(
                b_key_sum, b_count, b_size, p_total, p_key_mean + i_kv * p, b_key_centre, o_c, m_c, o_p, m_p, p,
                SECOND_ORDER,
            )  # fmt: skip
        b_value_mean = mean_without(
            b_value_sum, b_count, b_size, p_value_total + i_kv * C * pv, p_value_mean + i_kv * pv, b_value_centre,
            o_c, m_c, o_v, m_v, pv, SECOND_ORDER,
        )  # fmt: skip
        if tl.program_id(1) == 0:
            store_rows(p_mean_key + i_block * C * p, p, o_c, m_c, o_p, m_p, b_key_mean)
            store_rows(p_mean_value + i_block * C * pv, pv, o_c, m_c, o_v, m_v, b_value_mean)
            tl.store(p_count + i_block * C + o_c, b_count, mask=m_c)  # programs of other columns write the same
        if SECOND_ORDER:
            b_row_mean = mean_without(
                b_row_sum, b_count, b_size, p_total, p_key_mean, b_row_centre, o_c, m_c, o_row, m_row, p, True
            )
            b_row_mean *= b_count[:, None]
            b_metric = dot(tl.trans(b_row_mean), b_key_mean, b_metric, PRECISION)
            b_cross = dot(tl.trans(b_row_mean), b_value_mean, b_cross, PRECISION)

    if SECOND_ORDER:
        # [BP, BP], [BP, BV]
        b_total = load_rows(p_metric_total + i_kv * p * p, p, o_row, m_row, o_p, m_p)
        b_metric = (b_total - b_metric) / (length - D)
        store_rows(p_metric + i_block * p * p, p, o_row, m_row, o_p, m_p, b_metric)
        b_total = load_rows(p_cross_total + i_kv * p * pv, pv, o_row, m_row, o_v, m_v)
        b_cross = (b_total - b_cross) / (length - D)
        store_rows(p_cross + i_block * p * pv, pv, o_row, m_row, o_v, m_v, b_cross)


# --- launchers ---


def residual(
    key: Tensor,
    value: Tensor,
    means: tuple[Tensor, Tensor],
    centres: tuple[Tensor, Tensor],
    selection: Selection,
    layout: Layout,
    num_strata: int,
    kind: str,
) -> Residual:
    """The residual of every block.

    Args:
        key: `[B, HK, n_k, p]`, last stride 1.
        value: `[B, HK, n_k, pv]`, last stride 1.
        means: Of keys `[B, HK, p]` and values `[B, HK, pv]`, float32.
        centres: What keys and values count less than they are, likewise: their means, or zero.
        selection: Columns and strata.
        layout: Of the batch.
        num_strata: Number of strata; 1 unless the kind is `"second_order"`, 0 for no residual.
        kind: `"second_order"`, `"mean"`, `"geometric"` or `"simple"`, as in `skein_attention`.
    """
    batch, heads, blocks, d = selection.columns.shape
    p, pv = key.shape[-1], value.shape[-1]
    is_second_order = kind == "second_order"
    sizes = (num_strata, p), (num_strata, pv), (num_strata,), (p * is_second_order, p), (p * is_second_order, pv)
    out = Residual(*(key.new_empty(batch, heads, blocks, *size, dtype=torch.float32) for size in sizes))
    if num_strata == 0:
        return out
    group = heads // key.shape[1]
    totals = out  # not read where the sums are known
    if is_second_order:
        keys = layout.key_index, layout.key_length
        totals = moments.totals(key, value, *centres, selection.stratum, num_strata, *keys)
    c = config("residual", padded(p), padded(pv), like=key)
    tiles = tuple(min(c.rows, padded(x)) for x in (num_strata, p, pv))
    rows, columns = triton.cdiv(p, tiles[1]) if is_second_order else 1, triton.cdiv(max(p, pv), min(tiles[1:]))
    block_kernel[(batch * heads * blocks, rows, columns)](
        key, value, *means, *centres, *totals, selection.columns, selection.stratum, layout.key_length, layout.blocks,
        *out, *key.stride()[:3], *value.stride()[:3], key.shape[2], heads, group, blocks,
        p=p, pv=pv, C=num_strata, D=d, BC=tiles[0], BP=tiles[1], BV=tiles[2], BN=c.keys, SECOND_ORDER=is_second_order,
        GEOMETRIC=kind == "geometric", PRECISION=precision(key), num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
