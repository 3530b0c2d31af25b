"""Strata: groups of similar keys, by k-means on a sample; a launch per iteration, no atomics.

Keys are not centred on load: the nearest mean is the one of the largest `k·m - (|m|²/2 + k̄·m)`, where `m` is a mean of
centred keys and `k̄` the mean of all keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout
from .tiles import config, dot, load_rows, padded, precision, store_rows


SAMPLE_PER_STRATUM = 8  # keys that the iterations look at, per stratum
ITERATIONS = 2
CHUNK = 1024  # keys of one program, when every key is put into its stratum


# --- kernels ---


@triton.jit
def load_means(
    p_means, p_k, p_index, stride_n, b_key_mean, o_c, length,
    p: tl.constexpr, P: tl.constexpr, c: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Means `[C, P]` of some strata, and which there are. The FIRST ones are keys at even spacing."""
    o_p = tl.arange(0, P)
    step = tl.cdiv(length, c)
    o_rank = step // 2 + step * o_c
    m_c = (o_rank < length) & (o_c < c)
    if FIRST:
        o_n = tl.load(p_index + o_rank, mask=m_c, other=0)
        b_means = load_rows(p_k, stride_n, o_n, m_c, o_p, o_p < p).to(tl.float32) - b_key_mean[None, :]
    else:
        b_means = load_rows(p_means, p, o_c, m_c, o_p, o_p < p)
    return b_means, m_c


@triton.jit
def nearest_stratum(
    b_k, p_means, p_k, p_index, stride_n, p_key_mean, length,
    p: tl.constexpr, P: tl.constexpr, c: tl.constexpr, BC: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`[N, P]` keys to the `[N]` nearest means; these are rounded, in product and offset."""
    o_p = tl.arange(0, P)
    b_best = tl.full([b_k.shape[0]], float("-inf"), tl.float32)
    b_nearest = tl.zeros([b_k.shape[0]], tl.int32)
    for first in range(0, c, BC):
        o_c = first + tl.arange(0, BC)
        b_key_mean = tl.load(p_key_mean + o_p, mask=o_p < p, other=0.0)
        b_means, m_c = load_means(p_means, p_k, p_index, stride_n, b_key_mean, o_c, length, p, P, c, FIRST)
        b_means = b_means.to(b_k.dtype)
        b_rounded = b_means.to(tl.float32)
        b_offset = tl.sum(b_rounded * (b_rounded / 2 + b_key_mean[None, :]), 1)
        b_close = dot(b_k, tl.trans(b_means), None, PRECISION) - b_offset[None, :]
        b_close = tl.where(m_c[None, :] & (b_close == b_close), b_close, float("-inf"))  # NaN is near to nothing
        b_here = tl.max(b_close, 1)
        b_nearest = tl.where(b_here > b_best, first + tl.argmax(b_close, 1), b_nearest)
        b_best = tl.maximum(b_best, b_here)
    return tl.minimum(b_nearest, c - 1)


@triton.jit
def means_kernel(
    p_k, p_key_mean, p_in, p_index, p_length, p_blocks, p_out, stride_b, stride_h, stride_n, n, HEADS,
    p: tl.constexpr, P: tl.constexpr, c: tl.constexpr, BC: tl.constexpr, SAMPLE: tl.constexpr, FIRST: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One of Lloyd's iterations on keys at even spacing, for some strata."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    if tl.load(p_blocks + i_b) == 0:
        return
    length = tl.load(p_length + i_b)
    p_k += i_b * stride_b + i_h * stride_h
    p_index += i_b * n
    p_in += i_bh * c * p
    p_key_mean += i_bh * p
    o_p, o_c = tl.arange(0, P), tl.program_id(1) * BC + tl.arange(0, BC)
    step = tl.cdiv(length, SAMPLE)
    b_sum = tl.zeros([BC, P], tl.float32)
    b_size = tl.zeros([BC], tl.float32)
    for first in range(0, SAMPLE, BN):
        o_rank = step // 2 + step * (first + tl.arange(0, BN))
        m_rank = o_rank < length
        o_n = tl.load(p_index + o_rank, mask=m_rank, other=0)
        # [BN, P]
        b_k = load_rows(p_k, stride_n, o_n, m_rank, o_p, o_p < p)
        b_nearest = nearest_stratum(
            b_k, p_in, p_k, p_index, stride_n, p_key_mean, length, p, P, c, BC, FIRST, PRECISION
        )
        b_member = (b_nearest[None, :] == o_c[:, None]) & m_rank[None, :]  # [BC, BN]
        b_sum = dot(b_member.to(tl.float32).to(b_k.dtype), b_k, b_sum, PRECISION)
        b_size += tl.sum(b_member.to(tl.float32), 1)
    b_key_mean = tl.load(p_key_mean + o_p, mask=o_p < p, other=0.0)
    b_means, m_c = load_means(p_in, p_k, p_index, stride_n, b_key_mean, o_c, length, p, P, c, FIRST)
    b_moved = b_sum / tl.maximum(b_size, 1.0)[:, None] - b_key_mean[None, :]
    b_means = tl.where((b_size > 0)[:, None], b_moved, b_means)
    store_rows(p_out + i_bh * c * p, p, o_c, m_c, o_p, o_p < p, b_means)


@triton.jit
def assign_kernel(
    p_k, p_key_mean, p_means, p_index, p_length, p_blocks, p_out, stride_b, stride_h, stride_n, n, HEADS, CHUNKS,
    p: tl.constexpr, P: tl.constexpr, c: tl.constexpr, BC: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_chunk, i_bh = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    if tl.load(p_blocks + i_b) == 0:
        return
    length = tl.load(p_length + i_b)
    o_p = tl.arange(0, P)
    for first in range(i_chunk * CHUNK, tl.minimum(i_chunk * CHUNK + CHUNK, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
        # [BN, P]
        b_k = load_rows(p_k + i_b * stride_b + i_h * stride_h, stride_n, o_n, m_rank, o_p, o_p < p)
        b_nearest = nearest_stratum(
            b_k, p_means + i_bh * c * p, p_k, p_index, stride_n, p_key_mean + i_bh * p, length, p, P, c, BC, False,
            PRECISION,
        )  # fmt: skip
        tl.store(p_out + i_bh * n + o_n, b_nearest, mask=m_rank)


# --- launchers ---


def means(key: Tensor, key_mean: Tensor, count: int, layout: Layout) -> Tensor:
    """Means of the strata, less that of all keys; some may stand for no key.

    Args:
        key: `[B, HK, n_k, p]`, last stride 1.
        key_mean: `[B, HK, p]` float32, over the valid keys.
        count: Number of strata.
        layout: Where the valid keys are.

    Returns:
        `[B, HK, count, p]` float32; undefined where a sequence is not sketched, or `count` is 1.
    """
    batch, heads, n, p = key.shape
    made = torch.empty(batch, heads, count, p, dtype=torch.float32, device=key.device)
    conf, tile = config("strata", padded(p), like=key), means_tile(key, count)
    for i in range(ITERATIONS if count > 1 else 0):
        before, made = made, torch.empty_like(made)
        means_kernel[(batch * heads, triton.cdiv(count, tile))](
            key, key_mean, before, layout.key_index, layout.key_length, layout.blocks, made, *key.stride()[:3], n,
            heads, p=p, P=padded(p), c=count, BC=tile, SAMPLE=SAMPLE_PER_STRATUM * count, FIRST=i == 0,
            BN=conf.keys, PRECISION=precision(key), num_warps=conf.warps, num_stages=conf.stages,
        )  # fmt: skip
    return made


def means_tile(key: Tensor, count: int) -> int:
    """How many of `count` means are compared with keys at a time: tiles of 8 KiB at most, but no fewer than 16."""
    return min(padded(count), max(16, 2**13 // (padded(key.shape[-1]) * key.element_size())))


def assign(key: Tensor, key_mean: Tensor, count: int, layout: Layout) -> Tensor:
    """The stratum of every valid key, as `sketch.strata.assign` defines it. Arguments as in `means`.

    Returns:
        `[B, HK, n_k]` int32, below `count`; 0 where a key is padding or its sequence is not sketched.
    """
    batch, heads, n, p = key.shape
    out = torch.zeros(batch, heads, n, dtype=torch.int32, device=key.device)
    if count == 1:
        return out
    conf, chunks = config("score", padded(p), like=key), triton.cdiv(n, CHUNK)
    assign_kernel[(batch * heads * chunks,)](
        key, key_mean, means(key, key_mean, count, layout), layout.key_index, layout.key_length, layout.blocks, out,
        *key.stride()[:3], n, heads, chunks,
        p=p, P=padded(p), c=count, BC=means_tile(key, count), CHUNK=CHUNK, BN=conf.keys, PRECISION=precision(key),
        num_warps=conf.warps, num_stages=conf.stages,
    )  # fmt: skip
    return out
