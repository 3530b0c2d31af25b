"""Sums over all valid keys of a sequence: means, totals per stratum, products of keys with keys and with values.

All are made chunk by chunk and added in one order: no float atomics, the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import config, dot, load_centred, load_rows, padded, precision


CHUNK = 1024  # keys


# --- kernels ---


@triton.jit
def sum_kernel(
    p_x, p_index, p_length, p_out, stride_b, stride_h, stride_n, n, HEADS, CHUNKS,
    p: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_chunk, i_bh = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    length = tl.load(p_length + i_b)
    o_p = tl.arange(0, P)
    b_sum = tl.zeros([P], tl.float32)
    for first in range(i_chunk * CHUNK, tl.minimum(i_chunk * CHUNK + CHUNK, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
        # [BN, P]
        b_x = load_rows(p_x + i_b * stride_b + i_h * stride_h, stride_n, o_n, m_rank, o_p, o_p < p)
        b_sum += tl.sum(b_x.to(tl.float32), 0)
    tl.store(p_out + (i_bh * CHUNKS + i_chunk) * p + o_p, b_sum, mask=o_p < p)


@triton.jit
def product_kernel(
    p_left, p_right, p_left_mean, p_right_mean, p_stratum, p_index, p_length, p_out, p_count,
    left_stride_b, left_stride_h, left_stride_n, right_stride_b, right_stride_h, right_stride_n, n, HEADS, CHUNKS,
    p: tl.constexpr, pr: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
    STRATA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk: `Σ left_j right_jᵀ`, or, with STRATA, the sum of `right` over each of `p` strata, and their sizes."""
    i_chunk, i_bh = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    length = tl.load(p_length + i_b)
    o_p, o_r = tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2) * BR + tl.arange(0, BR)
    b_right_mean = tl.load(p_right_mean + i_bh * pr + o_r, mask=o_r < pr, other=0.0)
    if not STRATA:
        b_left_mean = tl.load(p_left_mean + i_bh * p + o_p, mask=o_p < p, other=0.0)
    b_sum, b_count = tl.zeros([BP, BR], tl.float32), tl.zeros([BP], tl.float32)
    for first in range(i_chunk * CHUNK, tl.minimum(i_chunk * CHUNK + CHUNK, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
        # [BN, BR]
        b_right = load_centred(
            p_right + i_b * right_stride_b + i_h * right_stride_h, right_stride_n, o_n, m_rank, o_r, o_r < pr,
            b_right_mean,
        )  # fmt: skip
        if STRATA:
            b_stratum = tl.load(p_stratum + i_bh * n + o_n, mask=m_rank, other=-1)
            b_left = (b_stratum[None, :] == o_p[:, None]).to(tl.float32).to(b_right.dtype)  # [BP, BN]
            b_count += tl.sum(b_left.to(tl.float32), 1)
        else:
            # [BP, BN]
            b_left = tl.trans(
                load_centred(
                    p_left + i_b * left_stride_b + i_h * left_stride_h, left_stride_n, o_n, m_rank, o_p, o_p < p,
                    b_left_mean,
                )
            )  # fmt: skip
        b_sum = dot(b_left, b_right, b_sum, PRECISION)
    p_tile = p_out + ((i_bh * CHUNKS + i_chunk) * p + o_p[:, None]) * pr + o_r[None, :]
    tl.store(p_tile, b_sum, mask=(o_p < p)[:, None] & (o_r < pr)[None, :])
    if STRATA:  # programs of other columns write the same
        tl.store(p_count + (i_bh * CHUNKS + i_chunk) * p + o_p, b_count, mask=o_p < p)


# --- launchers ---


def means(x: Tensor, index: Tensor, length: Tensor) -> Tensor:
    """Mean over the valid rows of every head; zero where there is none.

    Args:
        x: `[B, HK, n, p]`, last stride 1.
        index: `[B, n]` int32, valid positions first.
        length: `[B]` int32.

    Returns:
        `[B, HK, p]` float32.
    """
    batch, heads, n, p = x.shape
    chunks = triton.cdiv(n, CHUNK)
    out = torch.empty(batch, heads, chunks, p, dtype=torch.float32, device=x.device)
    c = config("moments", padded(p))
    sum_kernel[(batch * heads * chunks,)](
        x, index, length, out, *x.stride()[:3], n, heads, chunks,
        p=p, P=padded(p), CHUNK=CHUNK, BN=c.keys, num_warps=c.warps,
    )  # fmt: skip
    return out.sum(2) / length.clamp_min(1)[:, None, None]


def products(
    left: Tensor, right: Tensor, left_mean: Tensor, right_mean: Tensor, index: Tensor, length: Tensor
) -> Tensor:
    """`Σ_j left_j right_jᵀ` over the valid rows, both less their means: `[B, HK, p, pr]` float32."""
    return _products(left, right, left_mean, right_mean, None, index, length, left.shape[-1])[0]


def stratum_sums(
    x: Tensor, mean: Tensor, stratum: Tensor, num_strata: int, index: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over each stratum of the valid rows less their mean, and its size.

    Args:
        x: `[B, HK, n, p]`, last stride 1.
        mean: `[B, HK, p]` float32.
        stratum: `[B, HK, n]` int32.
        num_strata: Number of strata.
        index: `[B, n]` int32, valid positions first.
        length: `[B]` int32.

    Returns:
        `[B, HK, num_strata, p]` and `[B, HK, num_strata]`, both float32.
    """
    return _products(x, x, mean, mean, stratum, index, length, num_strata)


def _products(left, right, left_mean, right_mean, stratum, index, length, rows: int) -> tuple[Tensor, Tensor]:
    batch, heads, n, pr = right.shape
    chunks = triton.cdiv(n, CHUNK)
    out = torch.empty(batch, heads, chunks, rows, pr, dtype=torch.float32, device=right.device)
    count = torch.empty(
        batch, heads, chunks, rows if stratum is not None else 0, dtype=torch.float32, device=out.device
    )
    c = config("moments", padded(pr), like=right)
    tile = min(64, padded(rows)), min(64, padded(pr))
    product_kernel[(batch * heads * chunks, triton.cdiv(rows, tile[0]), triton.cdiv(pr, tile[1]))](
        left, right, left_mean, right_mean, index if stratum is None else stratum, index, length, out, count,
        *left.stride()[:3], *right.stride()[:3], n, heads, chunks,
        p=rows, pr=pr, BP=tile[0], BR=tile[1], CHUNK=CHUNK, BN=c.keys, STRATA=stratum is not None,
        PRECISION=precision(right), num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out.sum(2), count.sum(2)
