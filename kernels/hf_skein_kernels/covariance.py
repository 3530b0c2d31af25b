"""Covariance of some rows of every head at even spacing, about their mean or about the pilots of their blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import config, dot, load_rows, padded, precision


# --- kernels ---


@triton.jit
def finite(b_x):
    """`b_x` in float32 with 0 for what is not finite, so that a broken row spoils no other."""
    b_x = b_x.to(tl.float32)
    return tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0)


@triton.jit
def part_of(o_rank, length, blocks, PARTS: tl.constexpr):
    """Block and part, as `block * PARTS + part`, of ranks in routed order; see `pilots.block_means`."""
    length, blocks = length.to(tl.int64), blocks.to(tl.int64)
    o_block = ((o_rank + 1) * blocks - 1) // length  # the last that begins at the rank or before
    o_first = o_block * length // blocks
    parts = tl.minimum(PARTS, length // blocks)
    return o_block * PARTS + (o_rank - o_first) * parts // ((o_block + 1) * length // blocks - o_first)


@triton.jit
def covariance_kernel(
    p_x, p_pilots, p_index, p_length, p_blocks, p_out, stride_b, stride_h, stride_n, index_stride_b, index_stride_h,
    HEADS, PILOTS, factor,
    p: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, LEAST: tl.constexpr, SAMPLE: tl.constexpr, PARTS: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """About the mean if PARTS is 0, else about the pilots `[PILOTS, p]`, PARTS of each block."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    blocks = tl.load(p_blocks + i_b)
    if blocks < LEAST:
        return
    length = tl.load(p_length + i_b)
    p_x += i_b * stride_b + i_h * stride_h
    p_index += i_b * index_stride_b + i_h * index_stride_h
    o_p, o_t = tl.arange(0, P), tl.program_id(1) * BT + tl.arange(0, BT)
    step = tl.cdiv(length, SAMPLE)
    count = tl.cdiv(length - step // 2, step)
    b_mean, b_mean_t = tl.zeros([P], tl.float32), tl.zeros([BT], tl.float32)
    if PARTS == 0:
        for first in range(0, count, BN):
            o_rank = step // 2 + step * (first + tl.arange(0, BN))
            m_rank = o_rank < length
            o_n = tl.load(p_index + o_rank, mask=m_rank, other=0)
            # [BN, P], [BN, BT]
            b_mean += tl.sum(finite(load_rows(p_x, stride_n, o_n, m_rank, o_p, o_p < p)), 0)
            b_mean_t += tl.sum(finite(load_rows(p_x, stride_n, o_n, m_rank, o_t, o_t < p)), 0)
        b_mean /= count
        b_mean_t /= count
    b_sum = tl.zeros([P, BT], tl.float32)
    for first in range(0, count, BN):
        o_rank = step // 2 + step * (first + tl.arange(0, BN))
        m_rank = o_rank < length
        o_n = tl.load(p_index + o_rank, mask=m_rank, other=0)
        # [BN, P], [BN, BT]
        b_x = load_rows(p_x, stride_n, o_n, m_rank, o_p, o_p < p).to(tl.float32)
        b_t = load_rows(p_x, stride_n, o_n, m_rank, o_t, o_t < p).to(tl.float32)
        if PARTS == 0:
            b_x = tl.where(m_rank[:, None], b_x - b_mean[None, :], 0.0)
            b_t = tl.where(m_rank[:, None], b_t - b_mean_t[None, :], 0.0)
        else:
            o_part = part_of(o_rank, length, blocks, PARTS)
            # [BN, P], [BN, BT]
            b_x -= load_rows(p_pilots + i_bh * PILOTS * p, p, o_part, m_rank, o_p, o_p < p).to(tl.float32)
            b_t -= load_rows(p_pilots + i_bh * PILOTS * p, p, o_part, m_rank, o_t, o_t < p).to(tl.float32)
        b_sum = dot(tl.trans(finite(b_x)), finite(b_t), b_sum, PRECISION)
    p_tile = p_out + (i_bh * p + o_p[:, None]) * p + o_t[None, :]
    tl.store(p_tile, b_sum * (factor / count), mask=(o_p < p)[:, None] & (o_t < p)[None, :])


# --- launchers ---


def covariance(
    x: Tensor,
    index: Tensor,
    length: Tensor,
    blocks: Tensor,
    *,
    sample: int,
    least: int = 1,
    pilots: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Covariance of at most `sample` valid rows of every head, at even spacing, times `factor`.

    Args:
        x: `[B, H, n, p]`, last stride 1.
        index: `[B, n]` or `[B, H, n]` int32, valid positions first.
        length: `[B]` int32.
        blocks: `[B]` int32.
        sample: Rows to look at.
        least: Sequences of fewer blocks are left out.
        pilots: `[B, H, blocks, parts, p]`; then about the pilot of each row's part, not about the mean. `index` is the
            routed order.
        factor: Multiplies the result.

    Returns:
        `[B, H, p, p]` float32; undefined where a sequence is left out.
    """
    batch, heads, _, p = x.shape
    out = torch.empty(batch, heads, p, p, dtype=torch.float32, device=x.device)
    conf = config("covariance", padded(p), like=x)
    tile = min(conf.rows, padded(p))
    index_strides = (*index.stride()[:-1], 0)[:2]
    parts, in_all = (0, 0) if pilots is None else (pilots.shape[3], pilots.shape[2] * pilots.shape[3])
    covariance_kernel[(batch * heads, triton.cdiv(p, tile))](
        x, out if pilots is None else pilots, index, length, blocks, out, *x.stride()[:3], *index_strides, heads,
        in_all, factor, p=p, P=padded(p), BT=tile, LEAST=least, SAMPLE=sample, PARTS=parts, BN=conf.keys,
        PRECISION=precision(x), num_warps=conf.warps, num_stages=conf.stages,
    )  # fmt: skip
    return out
