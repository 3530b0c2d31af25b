"""Sums over all valid keys of a sequence: totals per stratum, and products of keys with keys and with values.

They are made chunk by chunk and added in one order: no float atomics, the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import config, dot, load_centred, padded, precision, store_rows


CHUNK = 1024  # keys


class Totals(NamedTuple):
    """Sums over all valid keys and values, less their means; float32.

    Attributes:
        key: `[B, HK, C, p]`, of the keys of each stratum.
        value: `[B, HK, C, pv]`, of their values.
        size: `[B, HK, C]`, how many there are.
        metric: `[B, HK, p, p]`, of `k kᵀ`.
        cross: `[B, HK, p, pv]`, of `k vᵀ`.
    """

    key: Tensor
    value: Tensor
    size: Tensor
    metric: Tensor
    cross: Tensor


# --- kernels ---


@triton.jit
def totals_kernel(
    p_key, p_value, p_key_mean, p_value_mean, p_stratum, p_index, p_length,
    p_key_sum, p_value_sum, p_size, p_metric, p_cross,
    key_stride_b, key_stride_h, key_stride_n, value_stride_b, value_stride_h, value_stride_n, n, HEADS, CHUNKS,
    PART,
    p: tl.constexpr, pv: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, BV: tl.constexpr,
    CHUNK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the `Totals` of a chunk: some strata and some rows of the products, and some columns of both."""
    i_chunk, i_bh = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_h, i_part = i_bh // HEADS, i_bh % HEADS, i_chunk.to(tl.int64) * PART
    length = tl.load(p_length + i_b)
    p_key += i_b * key_stride_b + i_h * key_stride_h
    p_value += i_b * value_stride_b + i_h * value_stride_h
    o_c, o_row = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(1) * BP + tl.arange(0, BP)
    o_p, o_v = tl.program_id(2) * BP + tl.arange(0, BP), tl.program_id(2) * BV + tl.arange(0, BV)
    m_c, m_row, m_p, m_v = o_c < C, o_row < p, o_p < p, o_v < pv
    b_row_mean = tl.load(p_key_mean + i_bh * p + o_row, mask=m_row, other=0.0)
    b_key_mean = tl.load(p_key_mean + i_bh * p + o_p, mask=m_p, other=0.0)
    b_value_mean = tl.load(p_value_mean + i_bh * pv + o_v, mask=m_v, other=0.0)
    b_key_sum, b_value_sum = tl.zeros([BC, BP], tl.float32), tl.zeros([BC, BV], tl.float32)
    b_metric, b_cross = tl.zeros([BP, BP], tl.float32), tl.zeros([BP, BV], tl.float32)
    b_size = tl.zeros([BC], tl.float32)
    for first in range(i_chunk * CHUNK, tl.minimum(i_chunk * CHUNK + CHUNK, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
        # [BN, BP], [BN, BP], [BN, BV]
        b_row = load_centred(p_key, key_stride_n, o_n, m_rank, o_row, m_row, b_row_mean)
        b_key = load_centred(p_key, key_stride_n, o_n, m_rank, o_p, m_p, b_key_mean)
        b_value = load_centred(p_value, value_stride_n, o_n, m_rank, o_v, m_v, b_value_mean)
        b_metric = dot(tl.trans(b_row), b_key, b_metric, PRECISION)
        b_cross = dot(tl.trans(b_row), b_value, b_cross, PRECISION)
        b_stratum = tl.load(p_stratum + i_bh * n + o_n, mask=m_rank, other=-1)
        b_member = (b_stratum[None, :] == o_c[:, None]).to(tl.float32)  # [BC, BN]
        b_size += tl.sum(b_member, 1)
        b_key_sum = dot(b_member.to(b_key.dtype), b_key, b_key_sum, PRECISION)
        b_value_sum = dot(b_member.to(b_key.dtype), b_value, b_value_sum, PRECISION)
    store_rows(p_key_sum + i_part + i_bh * C * p, p, o_c, m_c, o_p, m_p, b_key_sum)
    store_rows(p_value_sum + i_part + i_bh * C * pv, pv, o_c, m_c, o_v, m_v, b_value_sum)
    store_rows(p_metric + i_part + i_bh * p * p, p, o_row, m_row, o_p, m_p, b_metric)
    store_rows(p_cross + i_part + i_bh * p * pv, pv, o_row, m_row, o_v, m_v, b_cross)
    tl.store(p_size + i_part + i_bh * C + o_c, b_size, mask=m_c)  # programs of other columns write the same


@triton.jit
def add_kernel(p_parts, p_out, PARTS, SIZE, BN: tl.constexpr):
    """The sum of all parts, in one order, in which parts of zeros at the end change no bit."""
    o_i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    b_sum = tl.zeros([BN], tl.float32)
    for i in range(PARTS):
        b_sum += tl.load(p_parts + i * tl.full([], SIZE, tl.int64) + o_i, mask=o_i < SIZE, other=0.0)
    tl.store(p_out + o_i, b_sum, mask=o_i < SIZE)


# --- launchers ---


def totals(
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_mean: Tensor,
    stratum: Tensor,
    num_strata: int,
    index: Tensor,
    length: Tensor,
) -> Totals:
    """Sums over all valid keys and values, less some means, in one pass.

    Args:
        key: `[B, HK, n, p]`, last stride 1.
        value: `[B, HK, n, pv]`, last stride 1.
        key_mean: `[B, HK, p]` float32.
        value_mean: `[B, HK, pv]` float32.
        stratum: `[B, HK, n]` int32.
        num_strata: Number of strata.
        index: `[B, n]` int32, valid positions first.
        length: `[B]` int32.
    """
    batch, heads, n, p = key.shape
    pv, chunks = value.shape[-1], triton.cdiv(n, CHUNK)
    shapes = (num_strata, p), (num_strata, pv), (num_strata,), (p, p), (p, pv)
    parts, views = room_for_parts(key, chunks, [(batch, heads, *shape) for shape in shapes])
    c = config("totals", padded(p), padded(pv), like=key)
    tiles = tuple(min(c.rows, padded(x)) for x in (num_strata, p, pv))
    rows, columns = (max(triton.cdiv(x, c.rows) for x in some) for some in ((num_strata, p), (p, pv)))
    totals_kernel[(batch * heads * chunks, rows, columns)](
        key, value, key_mean, value_mean, stratum, index, length, *views(parts[0]),
        *key.stride()[:3], *value.stride()[:3], n, heads, chunks, parts.shape[1],
        p=p, pv=pv, C=num_strata, BC=tiles[0], BP=tiles[1], BV=tiles[2], CHUNK=CHUNK, BN=c.keys,
        PRECISION=precision(key), num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return Totals(*views(add_parts(parts)))


def room_for_parts(
    like: Tensor, count: int, shapes: list[tuple[int, ...]]
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """Room for `count` parts of several results, `[count, size]` float32, and what makes one part their views."""
    sizes = [math.prod(shape) for shape in shapes]
    room = [-(-size // 4) * 4 for size in sizes]  # all begin at multiples of 16 bytes

    def views(part: Tensor) -> list[Tensor]:
        return [x[:size].view(shape) for x, size, shape in zip(part.split(room), sizes, shapes, strict=True)]

    return like.new_empty(count, sum(room), dtype=torch.float32), views


def add_parts(parts: Tensor) -> Tensor:
    """The sum `[size]` of all parts `[count, size]`."""
    count, size = parts.shape
    if count == 1:
        return parts[0]
    out = parts.new_empty(size)
    add_kernel[(triton.cdiv(size, 1024),)](parts, out, count, size, BN=1024, num_warps=4)
    return out
