"""Pilots: the query rows that say which columns matter: mean queries of blocks, or random rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout
from .random import PILOT_STREAM, uniform
from .tiles import config, dot, load_rows, padded, precision


PIECE = 1024  # keys of one program


# --- kernels ---


@triton.jit
def mean_kernel(
    p_q, p_order, p_length, p_blocks, p_out, stride_b, stride_h, stride_n, order_stride_b, order_stride_h, HEADS,
    BLOCKS,
    p: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The mean query of a part of a block."""
    i_bh, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    length, blocks = tl.load(p_length + i_b).to(tl.int64), tl.load(p_blocks + i_b).to(tl.int64)
    i_block, i_part = i_part // PARTS, i_part % PARTS
    if i_block >= blocks:
        return
    parts = tl.minimum(PARTS, length // blocks)
    o_p = tl.arange(0, P)
    b_sum = tl.zeros([P], tl.float32)
    begin = i_block * length // blocks
    size = (i_block + 1) * length // blocks - begin
    first, last = begin, begin  # a part that there is not
    if i_part < parts:
        first, last = begin + tl.cdiv(i_part * size, parts), begin + tl.cdiv((i_part + 1) * size, parts)
    for start in range(first, last, BN):
        o_rank = start + tl.arange(0, BN)
        o_n = tl.load(p_order + i_b * order_stride_b + i_h * order_stride_h + o_rank, mask=o_rank < last, other=0)
        # [BN, P]
        b_q = load_rows(p_q + i_b * stride_b + i_h * stride_h, stride_n, o_n, o_rank < last, o_p, o_p < p)
        b_sum += tl.sum(b_q.to(tl.float32), 0)
    b_mean = b_sum / tl.maximum(last - first, 1).to(tl.float32)
    p_row = p_out + ((i_bh * BLOCKS + i_block) * PARTS + i_part) * p
    tl.store(p_row + o_p, b_mean.to(p_out.dtype.element_ty), mask=o_p < p)


@triton.jit
def lse_kernel(
    p_pilots, p_k, p_bias, p_index, p_length, p_blocks, p_out, stride_b, stride_h, stride_n, n, HEADS, GROUP, PILOTS,
    CHUNKS, scale,
    p: tl.constexpr, P: tl.constexpr, BIAS: tl.constexpr, PIECE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of some pilots over a chunk of the keys: the logarithm of the sum of the exponentials of the logits."""
    i_chunk, i_bh = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    length = tl.load(p_length + i_b)
    if (tl.load(p_blocks + i_b) == 0) | (i_chunk * PIECE >= length):
        return
    p_k += i_b * stride_b + (i_h // GROUP) * stride_h
    o_p, o_m = tl.arange(0, P), tl.program_id(1) * BM + tl.arange(0, BM)
    # [BM, P]
    b_pilots = load_rows(p_pilots + i_bh * PILOTS * p, p, o_m, o_m < PILOTS, o_p, o_p < p)
    b_largest, b_sum = tl.full([BM], -1e38, tl.float32), tl.zeros([BM], tl.float32)
    for first in range(i_chunk * PIECE, tl.minimum(i_chunk * PIECE + PIECE, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
        # [BN, P]
        b_k = load_rows(p_k, stride_n, o_n, m_rank, o_p, o_p < p)
        b_logits = dot(b_pilots, tl.trans(b_k), None, PRECISION) * scale
        if BIAS:
            b_logits += tl.load(p_bias + i_bh * n + o_rank, mask=m_rank, other=0.0)[None, :]
        b_logits = tl.where(m_rank[None, :], b_logits, float("-inf"))
        b_new = tl.maximum(b_largest, tl.max(b_logits, 1))
        b_sum = b_sum * tl.exp(b_largest - b_new) + tl.sum(tl.exp(b_logits - b_new[:, None]), 1)
        b_largest = b_new
    tl.store(p_out + (i_bh * CHUNKS + i_chunk) * PILOTS + o_m, b_largest + tl.log(b_sum), mask=o_m < PILOTS)


@triton.jit(do_not_specialize=["key"])
def pilot_rows_kernel(p_index, p_length, p_rows, p_distinct, n, HEADS, PILOTS, key, M: tl.constexpr, BM: tl.constexpr):
    """Random rows with replacement; and the same with -1 in place of what has come before."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    length = tl.load(p_length + i_b)
    o_m = tl.arange(0, M)
    o_rank = (uniform(key, i_h, PILOT_STREAM, o_m) * length).to(tl.int32)
    m_rank = (o_m < PILOTS) & (o_rank < length)
    o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
    b_seen = tl.zeros([M], tl.int32)
    for first in range(0, M, BM):
        o_other = first + tl.arange(0, BM)
        o_other_rank = (uniform(key, i_h, PILOT_STREAM, o_other) * length).to(tl.int32)
        b_same = (o_other_rank[None, :] == o_rank[:, None]) & (o_other[None, :] < o_m[:, None])
        b_seen += tl.sum(b_same.to(tl.int32), 1)
    tl.store(p_rows + i_bh * PILOTS + o_m, o_n, mask=o_m < PILOTS)
    tl.store(p_distinct + i_bh * PILOTS + o_m, tl.where(m_rank & (b_seen == 0), o_n, -1), mask=o_m < PILOTS)


# --- launchers ---


def block_means(query: Tensor, order: Tensor, blocks: int, parts: int, layout: Layout) -> Tensor:
    """Mean query of each block, or of `parts` consecutive parts of it.

    Args:
        query: `[B, H, n_q, p]`, last stride 1.
        order: `[B, H, n_q]` int32, last stride 1, see `Selection.order`; without marks.
        blocks: Most blocks that a sequence has.
        parts: Parts per block; a sequence whose smallest block is smaller has fewer of them.
        layout: The layout.

    Returns:
        `[B, H, blocks, parts, p]` in the dtype of `query`; zero for a part that a sequence lacks,
        undefined for a block.
    """
    batch, heads, _, p = query.shape
    out = query.new_empty(batch, heads, blocks, parts, p)
    conf = config("points", padded(p), like=query)
    mean_kernel[(batch * heads, blocks * parts)](
        query, order, layout.query_length, layout.blocks, out, *query.stride()[:3], *order.stride()[:2], heads, blocks,
        p=p, P=padded(p), PARTS=parts, BN=conf.keys, num_warps=conf.warps, num_stages=conf.stages,
    )  # fmt: skip
    return out


def log_sum_exp(pilots: Tensor, key: Tensor, bias: Tensor | None, scale: float, layout: Layout) -> Tensor:
    """Logarithm of the sum over the valid keys of `exp(scale * q·k + bias)`.

    Args:
        pilots: `[B, H, r, p]` contiguous, in the dtype of `key`.
        key: `[B, HK, n_k, p]`, last stride 1.
        bias: `[B, H, n_k]` float32, by rank; None: none.
        scale: Multiplies the logits.
        layout: The layout.

    Returns:
        `[B, H, r]` float32; `-inf` for a sequence that is not sketched.
    """
    batch, heads, rows, p = pilots.shape
    n, chunks = key.shape[2], triton.cdiv(key.shape[2], PIECE)
    out = torch.full((batch, heads, chunks, rows), -torch.inf, device=key.device)
    conf = config("pilots", padded(p), like=key)
    lse_kernel[(batch * heads * chunks, triton.cdiv(rows, conf.rows))](
        pilots, key, pilots if bias is None else bias, layout.key_index, layout.key_length, layout.blocks, out,
        *key.stride()[:3], n, heads, heads // key.shape[1], rows, chunks, scale,
        p=p, P=padded(p), BIAS=bias is not None, PIECE=PIECE, BM=conf.rows, BN=conf.keys, PRECISION=precision(key),
        num_warps=conf.warps, num_stages=conf.stages,
    )  # fmt: skip
    return out.logsumexp(2)


def random_rows(query: Tensor, count: int, random_key: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Rows drawn uniformly with replacement (step 1 of Algorithm 1), those of `sketch.pilots.random_rows`.

    Args:
        query: `[B, H, n_q, p]`, only its shape and device are used.
        count: How many.
        random_key: Of `random.random_key`.
        layout: The layout.

    Returns:
        Positions `[B, H, count]` int32, and the same with -1 in place of what has come before.
    """
    batch, heads, n, _ = query.shape
    rows = torch.empty(batch, heads, count, dtype=torch.int32, device=query.device)
    distinct = torch.empty_like(rows)
    pilot_rows_kernel[(batch * heads,)](
        layout.query_index, layout.query_length, rows, distinct, n, heads, count, random_key,
        M=padded(count), BM=16, num_warps=4,
    )  # fmt: skip
    return rows, distinct
