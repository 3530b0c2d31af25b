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
def means_kernel(
    p_x, p_mean, p_centre, p_total, p_size, p_columns, p_stratum, p_length, p_blocks, p_out, p_count,
    stride_b, stride_h, stride_n, n, H, GROUP, G,
    p: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    SUMMED: tl.constexpr, GEOMETRIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Means of the strata without the columns of a block; with GEOMETRIC the mean of the columns instead.

    If nothing was SUMMED, there is one stratum, whose sum follows from the mean.
    """
    i_g, i_bh = tl.program_id(0) % G, (tl.program_id(0) // G).to(tl.int64)
    i_b, i_kv = i_bh // H, i_bh // H * (H // GROUP) + i_bh % H // GROUP
    if i_g >= tl.load(p_blocks + i_b):
        return
    o_c, o_p = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(2) * BT + tl.arange(0, BT)
    b_centre = tl.load(p_centre + i_kv * p + o_p, mask=o_p < p, other=0.0)
    b_sum, b_drawn = tl.zeros([BC, BT], tl.float32), tl.zeros([BC], tl.float32)
    for first in range(0, D, BN):
        o_d = first + tl.arange(0, BN)
        o_n = tl.load(p_columns + (i_bh * G + i_g) * D + o_d, mask=o_d < D, other=0)
        b_stratum = tl.load(p_stratum + i_kv * n + o_n, mask=o_d < D, other=-1)
        p_head = p_x + i_b * stride_b + (i_kv % (H // GROUP)) * stride_h
        # [BN, BT]
        b_x = load_centred(p_head, stride_n, o_n, o_d < D, o_p, o_p < p, b_centre)
        b_members = (b_stratum[None, :] == o_c[:, None]).to(tl.float32).to(b_x.dtype)  # [BC, BN]
        b_sum = dot(b_members, b_x, b_sum, PRECISION)
        b_drawn += tl.sum(b_members.to(tl.float32), 1)
    if SUMMED:
        b_size = tl.load(p_size + i_kv * C + o_c, mask=o_c < C, other=0.0)
    else:
        b_size = tl.where(o_c < C, tl.load(p_length + i_b), 0).to(tl.float32)
    b_count = b_size - b_drawn
    if GEOMETRIC:
        b_sum = b_sum / D
    else:
        # [BC, BT]
        if SUMMED:
            b_total = load_rows(p_total + i_kv * C * p, p, o_c, o_c < C, o_p, o_p < p)
        else:
            b_mean = tl.load(p_mean + i_kv * p + o_p, mask=o_p < p, other=0.0)
            b_total = b_size[:, None] * (b_mean - b_centre)[None, :]
        b_sum = tl.where(b_count[:, None] > 0, b_total - b_sum, 0.0) / tl.maximum(b_count, 1.0)[:, None]
    i_block = i_bh * G + i_g
    store_rows(p_out + i_block * C * p, p, o_c, o_c < C, o_p, o_p < p, b_sum)
    tl.store(p_count + i_block * C + o_c, b_count, mask=o_c < C)


@triton.jit
def covariance_kernel(
    p_key, p_right, p_key_mean, p_right_mean, p_total, p_columns, p_mean_key, p_mean_right, p_count,
    p_length, p_blocks, p_out, key_stride_b, key_stride_h, key_stride_n, right_stride_b, right_stride_h, right_stride_n,
    H, GROUP, G,
    p: tl.constexpr, pr: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of `W` (`right` is the key) or of `X` (`right` is the value) of one block."""
    i_g, i_bh = tl.program_id(0) % G, (tl.program_id(0) // G).to(tl.int64)
    i_b, i_kv = i_bh // H, i_bh // H * (H // GROUP) + i_bh % H // GROUP
    if i_g >= tl.load(p_blocks + i_b):
        return
    i_head, i_block = i_kv % (H // GROUP), i_bh * G + i_g
    o_p, o_r = tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2) * BR + tl.arange(0, BR)
    b_key_mean = tl.load(p_key_mean + i_kv * p + o_p, mask=o_p < p, other=0.0)
    b_right_mean = tl.load(p_right_mean + i_kv * pr + o_r, mask=o_r < pr, other=0.0)
    b_drawn = tl.zeros([BP, BR], tl.float32)
    for first in range(0, D, BN):
        o_d = first + tl.arange(0, BN)
        o_n = tl.load(p_columns + i_block * D + o_d, mask=o_d < D, other=0)
        # [BN, BP]
        p_head = p_key + i_b * key_stride_b + i_head * key_stride_h
        b_key = load_centred(p_head, key_stride_n, o_n, o_d < D, o_p, o_p < p, b_key_mean)
        # [BN, BR]
        p_head = p_right + i_b * right_stride_b + i_head * right_stride_h
        b_right = load_centred(p_head, right_stride_n, o_n, o_d < D, o_r, o_r < pr, b_right_mean)
        b_drawn = dot(tl.trans(b_key), b_right, b_drawn, PRECISION)
    for first in range(0, C, BN):
        o_c = first + tl.arange(0, BN)
        b_count = tl.load(p_count + i_block * C + o_c, mask=o_c < C, other=0.0)
        # [BN, BP] and [BN, BR]
        b_key = load_rows(p_mean_key + i_block * C * p, p, o_c, o_c < C, o_p, o_p < p)
        b_right = load_rows(p_mean_right + i_block * C * pr, pr, o_c, o_c < C, o_r, o_r < pr)
        b_drawn = dot(tl.trans(b_key * b_count[:, None]), b_right, b_drawn, PRECISION)
    # [BP, BR]
    b_total = load_rows(p_total + i_kv * p * pr, pr, o_p, o_p < p, o_r, o_r < pr)
    rest = tl.load(p_length + i_b) - D
    store_rows(p_out + i_block * p * pr, pr, o_p, o_p < p, o_r, o_r < pr, (b_total - b_drawn) / rest)


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
    for x, mean, centre, total, result, geometric in (
        (value, means[1], centres[1], totals.value, out.value, False),
        (key, means[0], centres[0], totals.key, out.key, kind == "geometric"),
    ):
        width = padded(x.shape[-1])
        c = config("blocks", width)
        tile = min(c.rows, padded(num_strata)), min(64, width)
        means_kernel[
            (batch * heads * blocks, triton.cdiv(num_strata, tile[0]), triton.cdiv(x.shape[-1], tile[1]))
        ](
            x, mean, centre, total, totals[2], selection.columns, selection.stratum, layout.key_length, layout.blocks,
            result, out.count, *x.stride()[:3], x.shape[2], heads, group, blocks,
            p=x.shape[-1], C=num_strata, D=d, BC=tile[0], BT=tile[1], BN=c.keys, SUMMED=is_second_order,
            GEOMETRIC=geometric, PRECISION=precision(x), num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    if not is_second_order:
        return out
    for x, centre, total, mean_x, result in (
        (key, centres[0], totals.metric, out.key, out.metric),
        (value, centres[1], totals.cross, out.value, out.cross),
    ):
        pr = x.shape[-1]
        c = config("blocks", padded(p), padded(pr))
        tile = min(c.rows, padded(p)), min(64, padded(pr))
        covariance_kernel[(batch * heads * blocks, triton.cdiv(p, tile[0]), triton.cdiv(pr, tile[1]))](
            key, x, centres[0], centre, total, selection.columns, out.key, mean_x, out.count,
            layout.key_length, layout.blocks, result, *key.stride()[:3], *x.stride()[:3],
            heads, group, blocks,
            p=p, pr=pr, C=num_strata, D=d, BP=tile[0], BR=tile[1], BN=c.keys,
            PRECISION=precision(x), num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return out
