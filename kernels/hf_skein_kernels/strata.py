"""Strata: groups of similar keys, by k-means on a sample; one program per key head, no atomics.

Keys are not centred on load: the nearest mean is the one of the largest `k·m - (|m|²/2 + k̄·m)`, where `m` is a mean of
centred keys and `k̄` the mean of all keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout
from .tiles import config, dot, load_rows, padded, precision


SAMPLE_PER_STRATUM = 8  # keys that the iterations look at, per stratum
ITERATIONS = 2
CHUNK = 1024  # keys of one program, when every key is put into its stratum


# --- kernels ---


@triton.jit
def nearest(b_k, b_means, b_key_mean, m_c, PRECISION: tl.constexpr):
    """`[N, P]` keys and `[C, P]` means of centred keys to the `[N]` nearest; rounded means, in product and offset."""
    b_means = b_means.to(b_k.dtype)
    b_rounded = b_means.to(tl.float32)
    b_offset = tl.sum(b_rounded * (b_rounded / 2 + b_key_mean[None, :]), 1)
    b_score = dot(b_k, tl.trans(b_means), None, PRECISION) - b_offset[None, :]
    return tl.argmax(tl.where(m_c[None, :], b_score, float("-inf")), 1)


@triton.jit
def means_kernel(
    p_k, p_key_mean, p_index, p_length, p_blocks, p_out, stride_b, stride_h, stride_n, n, HEADS,
    p: tl.constexpr, P: tl.constexpr, c: tl.constexpr, C: tl.constexpr, SAMPLE: tl.constexpr, ITERATIONS: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lloyd's iterations from keys at even spacing, on keys at even spacing."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    if tl.load(p_blocks + i_b) == 0:
        return
    length = tl.load(p_length + i_b)
    p_k += i_b * stride_b + i_h * stride_h
    p_index += i_b * n
    o_p, o_c = tl.arange(0, P), tl.arange(0, C)
    b_key_mean = tl.load(p_key_mean + i_bh * p + o_p, mask=o_p < p, other=0.0)
    step = tl.cdiv(length, c)
    o_start = step // 2 + step * o_c
    m_c = (o_start < length) & (o_c < c)
    o_start = tl.load(p_index + o_start, mask=m_c, other=0)
    # [C, P]
    b_means = load_rows(p_k, stride_n, o_start, m_c, o_p, o_p < p).to(tl.float32) - b_key_mean[None, :]
    step = tl.cdiv(length, SAMPLE)
    for _ in range(ITERATIONS):
        b_sum = tl.zeros([C, P], tl.float32)
        b_size = tl.zeros([C], tl.float32)
        for first in range(0, SAMPLE, BN):
            o_rank = step // 2 + step * (first + tl.arange(0, BN))
            m_rank = o_rank < length
            o_n = tl.load(p_index + o_rank, mask=m_rank, other=0)
            # [BN, P]
            b_k = load_rows(p_k, stride_n, o_n, m_rank, o_p, o_p < p)
            b_nearest = nearest(b_k, b_means, b_key_mean, m_c, PRECISION)
            b_member = (b_nearest[None, :] == o_c[:, None]) & m_rank[None, :]  # [C, BN]
            b_sum = dot(b_member.to(tl.float32).to(b_k.dtype), b_k, b_sum, PRECISION)
            b_size += tl.sum(b_member.to(tl.float32), 1)
        b_moved = b_sum / tl.maximum(b_size, 1.0)[:, None] - b_key_mean[None, :]
        b_means = tl.where((b_size > 0)[:, None], b_moved, b_means)
    tl.store(p_out + (i_bh * c + o_c[:, None]) * p + o_p[None, :], b_means, mask=m_c[:, None] & (o_p < p)[None, :])


@triton.jit
def assign_kernel(
    p_k, p_key_mean, p_means, p_index, p_length, p_blocks, p_out, stride_b, stride_h, stride_n, n, HEADS, CHUNKS,
    p: tl.constexpr, P: tl.constexpr, c: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_chunk, i_bh = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    if tl.load(p_blocks + i_b) == 0:
        return
    length = tl.load(p_length + i_b)
    o_p, o_c = tl.arange(0, P), tl.arange(0, C)
    b_key_mean = tl.load(p_key_mean + i_bh * p + o_p, mask=o_p < p, other=0.0)
    step = tl.cdiv(length, c)
    m_c = (step // 2 + step * o_c < length) & (o_c < c)  # the means that there are
    b_means = load_rows(p_means + i_bh * c * p, p, o_c, m_c, o_p, o_p < p)  # [C, P]
    for first in range(i_chunk * CHUNK, tl.minimum(i_chunk * CHUNK + CHUNK, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
        # [BN, P]
        b_k = load_rows(p_k + i_b * stride_b + i_h * stride_h, stride_n, o_n, m_rank, o_p, o_p < p)
        b_nearest = nearest(b_k, b_means, b_key_mean, m_c, PRECISION)
        tl.store(p_out + i_bh * n + o_n, tl.minimum(b_nearest, c - 1), mask=m_rank)


# --- launchers ---


def assign(key: Tensor, key_mean: Tensor, count: int, layout: Layout) -> Tensor:
    """The stratum of every valid key, as `sketch.strata.assign` defines it.

    Args:
        key: `[B, HK, n_k, p]`, last stride 1.
        key_mean: `[B, HK, p]` float32, over the valid keys.
        count: Number of strata; some may stay empty.
        layout: Where the valid keys are.

    Returns:
        `[B, HK, n_k]` int32, below `count`; 0 where a key is padding or its sequence is not sketched.
    """
    batch, heads, n, p = key.shape
    if count == 1:
        return torch.zeros(batch, heads, n, dtype=torch.int32, device=key.device)
    means = torch.empty(batch, heads, count, p, dtype=torch.float32, device=key.device)
    out = torch.zeros(batch, heads, n, dtype=torch.int32, device=key.device)
    conf, chunks = config("strata", padded(p), padded(count), like=key), triton.cdiv(n, CHUNK)
    shared = dict(
        p=p, P=padded(p), c=count, C=padded(count), BN=conf.keys, PRECISION=precision(key),
        num_warps=conf.warps, num_stages=conf.stages,
    )  # fmt: skip
    ragged = (layout.key_index, layout.key_length, layout.blocks)
    means_kernel[(batch * heads,)](
        key, key_mean, *ragged, means, *key.stride()[:3], n, heads,
        SAMPLE=SAMPLE_PER_STRATUM * count, ITERATIONS=ITERATIONS, **shared,
    )  # fmt: skip
    assign_kernel[(batch * heads * chunks,)](
        key, key_mean, means, *ragged, out, *key.stride()[:3], n, heads, chunks, CHUNK=CHUNK, **shared
    )
    return out
