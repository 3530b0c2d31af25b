"""Columns: for every block the `d` keys of the highest score, without ever holding `blocks x n` scores.

A radix selection in four passes over the keys, each of which computes the scores again, tile by tile, as products of
pilots and keys. Scores count as 16-bit integers, at even spacing between the lowest and the highest finite one of the
block. The passes find: the range; how many codes have each upper byte, hence that of the `d`-th largest; the same for
the lower byte, chunk by chunk, hence how many of its columns a chunk holds; and then write the columns. Equal codes go
by position. A threshold by radix needs a fixed number of passes and a workspace that does not grow with `n`; a heap is
serial, and merging sorted tiles costs more than the products.

All passes run one compiled kernel, so that they see the same bits of every score. Counting is by integer atomics, whose
order does not matter: the result is the same in every run, and in ascending order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout
from .pilots import PIECE, log_sum_exp
from .random import COLUMN_STREAM, gumbel, uniform
from .tiles import config, dot, load_rows, padded, precision


_WORKSPACE = 512  # histograms of 256 bins per head, at most; but at least one per block
_MOST_CHUNKS = 32


# --- kernels ---


@triton.jit
def log_norm(b_v):
    """Logarithm of the norm of each row, `[N]`."""
    return 0.5 * tl.log(tl.sum(b_v * b_v, 1))


@triton.jit
def bias_kernel(
    p_k, p_v, p_key_mean, p_value_mean, p_covariance, p_index, p_length, p_blocks, p_out, p_spread,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, n, HEADS, GROUP, CHUNKS, exact_rows,
    p: tl.constexpr, pv: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, BT: tl.constexpr, PIECE: tl.constexpr,
    BN: tl.constexpr, SEPARATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By rank: the spread of queries along each key plus the logarithm of the norm of its value, both about the means.

    Infinite for the first `exact_rows` keys, which are always taken. With SEPARATE the spread goes to `p_spread`.
    """
    i_chunk, i_bh = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    if tl.load(p_blocks + i_b) == 0:
        return
    length = tl.load(p_length + i_b)
    p_k += i_b * k_stride_b + (i_h // GROUP) * k_stride_h
    p_v += i_b * v_stride_b + (i_h // GROUP) * v_stride_h
    p_covariance += i_bh * p * p
    o_p, o_v = tl.arange(0, P), tl.arange(0, PV)
    b_key_mean = tl.load(p_key_mean + (i_bh // GROUP) * p + o_p, mask=o_p < p, other=0.0)
    b_value_mean = tl.load(p_value_mean + (i_bh // GROUP) * pv + o_v, mask=o_v < pv, other=0.0)
    for first in range(i_chunk * PIECE, tl.minimum(i_chunk * PIECE + PIECE, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
        # [BN, P]
        b_k = load_rows(p_k, k_stride_n, o_n, m_rank, o_p, o_p < p).to(tl.float32) - b_key_mean[None, :]
        b_spread = tl.zeros([BN], tl.float32)
        for tile in range(0, P, BT):
            o_t = tile + tl.arange(0, BT)
            b_key_mean_t = tl.load(p_key_mean + (i_bh // GROUP) * p + o_t, mask=o_t < p, other=0.0)
            # [P, BT], [BN, BT]
            b_covariance = load_rows(p_covariance, p, o_p, o_p < p, o_t, o_t < p)
            b_t = load_rows(p_k, k_stride_n, o_n, m_rank, o_t, o_t < p).to(tl.float32) - b_key_mean_t[None, :]
            b_spread += tl.sum(dot(b_k, b_covariance, None, PRECISION) * b_t, 1)
        # [BN, PV]
        b_v = load_rows(p_v, v_stride_n, o_n, m_rank, o_v, o_v < pv).to(tl.float32) - b_value_mean[None, :]
        b_bias = log_norm(tl.where((o_v < pv)[None, :], b_v, 0.0))
        if SEPARATE:
            tl.store(p_spread + i_bh * n + o_rank, b_spread, mask=m_rank)
        else:
            b_bias += b_spread
        b_bias = tl.where(o_rank < exact_rows, float("inf"), b_bias)
        tl.store(p_out + i_bh * n + o_rank, b_bias, mask=m_rank)


@triton.jit(do_not_specialize=["key"])
def draw_kernel(
    p_pilots, p_k, p_v, p_lse, p_index, p_length, p_blocks, p_out,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, n, HEADS, GROUP, PILOTS, CHUNKS,
    scale, key, exact_rows,
    p: tl.constexpr, pv: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, PIECE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, UNIFORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By rank: Gumbel noise plus, unless UNIFORM, the logarithm of the probability of each key (eq. 5 of the paper)."""
    i_chunk, i_bh = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    if tl.load(p_blocks + i_b) == 0:
        return
    length = tl.load(p_length + i_b)
    p_k += i_b * k_stride_b + (i_h // GROUP) * k_stride_h
    p_v += i_b * v_stride_b + (i_h // GROUP) * v_stride_h
    o_p, o_v = tl.arange(0, P), tl.arange(0, PV)
    for first in range(i_chunk * PIECE, tl.minimum(i_chunk * PIECE + PIECE, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        b_score = gumbel(uniform(key, i_h, COLUMN_STREAM, o_rank))
        if not UNIFORM:
            o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
            # [BN, P], [BN, PV]
            b_k = load_rows(p_k, k_stride_n, o_n, m_rank, o_p, o_p < p)
            b_v = load_rows(p_v, v_stride_n, o_n, m_rank, o_v, o_v < pv).to(tl.float32)
            b_largest, b_sum = tl.full([BN], -1e38, tl.float32), tl.zeros([BN], tl.float32)
            for start in range(0, PILOTS, BM):
                o_m = start + tl.arange(0, BM)
                b_lse = tl.load(p_lse + i_bh * PILOTS + o_m, mask=o_m < PILOTS, other=0.0)
                # [BM, P]
                b_pilots = load_rows(p_pilots + i_bh * PILOTS * p, p, o_m, o_m < PILOTS, o_p, o_p < p)
                b_square = 2.0 * (dot(b_k, tl.trans(b_pilots), None, PRECISION) * scale - b_lse[None, :])
                b_square = tl.where((o_m < PILOTS)[None, :], b_square, float("-inf"))
                b_new = tl.maximum(b_largest, tl.max(b_square, 1))
                b_sum = b_sum * tl.exp(b_largest - b_new) + tl.sum(tl.exp(b_square - b_new[:, None]), 1)
                b_largest = b_new
            b_score += 0.5 * (b_largest + tl.log(b_sum)) + log_norm(b_v)
        b_score = tl.where(o_rank < exact_rows, float("inf"), b_score)
        tl.store(p_out + i_bh * n + o_rank, b_score, mask=m_rank)


@triton.jit
def load_scores(
    p_pilots, p_k, p_bias, p_spread, p_lse, o_rank, m_rank, o_n, o_g, m_g, stride_n, scale,
    p: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, BG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[N, BG]` of keys in blocks. PARTS pilots per block; 0: the score is the bias."""
    # [N]
    b_bias = tl.load(p_bias + o_rank, mask=m_rank, other=0.0)
    if PARTS == 0:
        b_score = tl.zeros([1, BG], tl.float32)
    else:
        o_p = tl.arange(0, P)
        # [N, P]
        b_k = load_rows(p_k, stride_n, o_n, m_rank, o_p, o_p < p)
        if PARTS == 1:
            # [BG, P]
            b_pilots = load_rows(p_pilots, p, o_g, m_g, o_p, o_p < p)
            b_score = dot(b_k, tl.trans(b_pilots), None, PRECISION) * scale
        else:  # the root mean square of several parts' probabilities, in logarithms
            b_spread = tl.load(p_spread + o_rank, mask=m_rank, other=0.0)
            b_largest = tl.full([o_rank.shape[0], BG], -1e38, tl.float32)
            b_sum = tl.zeros([o_rank.shape[0], BG], tl.float32)
            for i in range(PARTS):
                o_row = o_g * PARTS + i
                b_lse = tl.load(p_lse + o_row, mask=m_g, other=0.0)
                # [BG, P]
                b_pilots = load_rows(p_pilots, p, o_row, m_g, o_p, o_p < p)
                b_logits = dot(b_k, tl.trans(b_pilots), None, PRECISION) * scale + b_spread[:, None]
                b_square = 2.0 * (b_logits - b_lse[None, :])
                b_new = tl.maximum(b_largest, b_square)
                b_sum = b_sum * tl.exp(b_largest - b_new) + tl.exp(b_square - b_new)
                b_largest = b_new
            b_score = 0.5 * (b_largest + tl.log(b_sum))
    return b_score + b_bias[:, None]


@triton.jit
def bin_from_above(b_histogram, b_rank):
    """Of histograms `[BG, 256]`: the last bin from and with which on there are `b_rank` entries; how many are above."""
    b_cumulative = tl.cumsum(b_histogram, 1, reverse=True)
    b_enough = b_cumulative >= b_rank[:, None]
    return tl.sum(b_enough.to(tl.int32), 1) - 1, tl.max(tl.where(b_enough, 0, b_cumulative), 1)


@triton.jit(do_not_specialize=["stage"])
def select_kernel(
    p_pilots, p_k, p_bias, p_spread, p_lse, p_index, p_length, p_blocks, p_range, p_histogram, p_above, p_before,
    p_threshold, p_out,
    stride_b, stride_h, stride_n, n, HEADS, GROUP, BLOCKS, CHUNKS, rows, scale, stage,
    d: tl.constexpr, p: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr,
    MOST_CHUNKS: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stage 0: the range of scores. 1: upper bytes. 2: lower bytes of those at the threshold. 3: write the columns.

    `p_range [.., CHUNKS, BLOCKS, 2]`, `p_histogram [.., 1 + CHUNKS, BLOCKS, 256]` (upper bytes; lower bytes by chunk),
    `p_above [.., CHUNKS, BLOCKS]`, `p_before [.., CHUNKS, BLOCKS, 2]`, `p_threshold [.., BLOCKS, 2]`; of those the last
    two are made by `offsets_kernel`.
    """
    i_chunk, i_bh = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    length, blocks = tl.load(p_length + i_b), tl.load(p_blocks + i_b)
    if SHARED:  # all blocks have the same columns
        blocks = tl.minimum(blocks, 1)
    o_g = tl.program_id(1) * BG + tl.arange(0, BG)
    m_g = o_g < blocks
    if (tl.program_id(1) * BG >= blocks) | (i_chunk * rows >= length):
        return
    p_k += i_b * stride_b + (i_h // GROUP) * stride_h
    p_index += i_b * n
    p_bias += i_bh * n
    p_spread += i_bh * n
    p_pilots += i_bh * BLOCKS * PARTS * p
    p_lse += i_bh * BLOCKS * PARTS
    p_out += (i_bh * BLOCKS + o_g) * d
    p_histogram += i_bh * (1 + CHUNKS) * BLOCKS * 256
    o_here = (i_bh * CHUNKS + i_chunk) * BLOCKS + o_g  # this chunk's own

    # What the stages before found; not used before they have run.
    b_low, b_unit = tl.zeros([BG], tl.float32), tl.zeros([BG], tl.float32)
    b_byte, b_code_at = tl.zeros([BG], tl.int32), tl.zeros([BG], tl.int32)
    b_need, b_above, b_ties = tl.zeros([BG], tl.int32), tl.zeros([BG], tl.int32), tl.zeros([BG], tl.int32)
    if stage > 0:
        o_chunk = tl.arange(0, MOST_CHUNKS)
        p_ranges = p_range + ((i_bh * CHUNKS + o_chunk[:, None]) * BLOCKS + o_g[None, :]) * 2
        m_ranges = (o_chunk * rows < length)[:, None] & m_g[None, :]
        b_low = tl.min(tl.load(p_ranges, mask=m_ranges, other=float("inf")), 0)
        b_high = tl.max(tl.load(p_ranges + 1, mask=m_ranges, other=float("-inf")), 0)
        b_unit = 65533.0 / tl.maximum(b_high - b_low, 1e-30)
    if stage == 2:
        p_bytes = p_histogram + o_g[:, None] * 256 + tl.arange(0, 256)[None, :]
        b_histogram = tl.load(p_bytes, mask=m_g[:, None], other=0)
        b_byte, _ = bin_from_above(b_histogram, tl.full([BG], d, tl.int32))
    if stage == 3:
        b_code_at = tl.load(p_threshold + (i_bh * BLOCKS + o_g) * 2, mask=m_g, other=0)
        b_need = tl.load(p_threshold + (i_bh * BLOCKS + o_g) * 2 + 1, mask=m_g, other=0)
        b_above = tl.load(p_before + o_here * 2, mask=m_g, other=0)
        b_ties = tl.load(p_before + o_here * 2 + 1, mask=m_g, other=0)

    b_least, b_most = tl.full([BG], float("inf"), tl.float32), tl.full([BG], float("-inf"), tl.float32)
    for first in range(i_chunk * rows, tl.minimum(i_chunk * rows + rows, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        o_n = tl.load(p_index + o_rank, mask=m_rank, other=0)
        b_score = load_scores(
            p_pilots, p_k, p_bias, p_spread, p_lse, o_rank, m_rank, o_n, o_g, m_g, stride_n, scale, p, P, PARTS,
            BG, PRECISION,
        )  # fmt: skip
        m_score = m_rank[:, None] & m_g[None, :]
        m_finite = m_score & (tl.abs(b_score) < float("inf"))
        b_code = tl.minimum(tl.maximum((b_score - b_low[None, :]) * b_unit[None, :], 0.0), 65533.0)
        b_code = 1 + tl.where(m_finite, b_code, 0.0).to(tl.int32)
        # Neither `-inf` nor NaN is preferred to anything.
        b_code = tl.where(m_finite, b_code, tl.where(b_score == float("inf"), 65535, 0))
        if stage == 0:
            b_least = tl.minimum(b_least, tl.min(tl.where(m_finite, b_score, float("inf")), 0))
            b_most = tl.maximum(b_most, tl.max(tl.where(m_finite, b_score, float("-inf")), 0))
        elif stage == 1:
            p_bin = p_histogram + o_g[None, :] * 256 + (b_code >> 8)
            tl.atomic_add(p_bin, tl.full(b_code.shape, 1, tl.int32), mask=m_score, sem="relaxed")
        elif stage == 2:
            p_bin = p_histogram + ((1 + i_chunk) * BLOCKS + o_g[None, :]) * 256 + (b_code & 255)
            m_here = m_score & (b_code >> 8 == b_byte[None, :])
            tl.atomic_add(p_bin, tl.full(b_code.shape, 1, tl.int32), mask=m_here, sem="relaxed")
            b_above += tl.sum((m_score & (b_code >> 8 > b_byte[None, :])).to(tl.int32), 0)
        else:
            b_more = (m_score & (b_code > b_code_at[None, :])).to(tl.int32)
            b_tie = (m_score & (b_code == b_code_at[None, :])).to(tl.int32)
            o_tie = b_ties[None, :] + tl.cumsum(b_tie, 0) - b_tie  # ties before this key
            o_slot = b_above[None, :] + tl.cumsum(b_more, 0) - b_more + tl.minimum(o_tie, b_need[None, :])
            m_taken = (b_more == 1) | ((b_tie == 1) & (o_tie < b_need[None, :]))
            tl.store(p_out[None, :] + o_slot, o_n[:, None], mask=m_taken & (o_slot < d))
            b_above += tl.sum(b_more, 0)
            b_ties += tl.sum(b_tie, 0)
    if stage == 0:
        tl.store(p_range + o_here * 2, b_least, mask=m_g)
        tl.store(p_range + o_here * 2 + 1, b_most, mask=m_g)
    if stage == 2:
        tl.store(p_above + o_here, b_above, mask=m_g)


@triton.jit
def offsets_kernel(
    p_histogram, p_above, p_before, p_threshold, p_length, p_blocks, HEADS, BLOCKS, CHUNKS, rows,
    d: tl.constexpr, SHARED: tl.constexpr, MOST_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Of a block: the code of its last column; by chunk, how many keys before it are above that code, and equal it."""
    i_g, i_bh = tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_b = i_bh // HEADS
    length, blocks = tl.load(p_length + i_b), tl.load(p_blocks + i_b)
    if SHARED:
        blocks = tl.minimum(blocks, 1)
    if i_g >= blocks:
        return
    o_bin, o_chunk = tl.arange(0, 256), tl.arange(0, MOST_CHUNKS)
    m_chunk = o_chunk * rows < length
    p_histogram += (i_bh * (1 + CHUNKS) * BLOCKS + i_g) * 256
    b_rank = tl.full([1], d, tl.int32)
    b_byte, b_over = bin_from_above(tl.load(p_histogram + o_bin)[None, :], b_rank)
    # [MOST_CHUNKS, 256]
    p_lower = p_histogram + (1 + o_chunk)[:, None] * BLOCKS * 256 + o_bin[None, :]
    b_lower = tl.load(p_lower, mask=m_chunk[:, None], other=0)
    b_lower_byte, b_over_here = bin_from_above(tl.sum(b_lower, 0)[None, :], b_rank - b_over)
    o_here = (i_bh * CHUNKS + o_chunk) * BLOCKS + i_g
    b_above = tl.load(p_above + o_here, mask=m_chunk, other=0)
    b_above += tl.sum(tl.where(o_bin[None, :] > b_lower_byte[:, None], b_lower, 0), 1)
    b_ties = tl.sum(tl.where(o_bin[None, :] == b_lower_byte[:, None], b_lower, 0), 1)
    tl.store(p_before + o_here * 2, tl.cumsum(b_above, 0) - b_above, mask=m_chunk)
    tl.store(p_before + o_here * 2 + 1, tl.cumsum(b_ties, 0) - b_ties, mask=m_chunk)
    p_threshold += (i_bh * BLOCKS + i_g) * 2 + tl.arange(0, 1)
    tl.store(p_threshold, b_byte * 256 + b_lower_byte)
    tl.store(p_threshold + 1, d - b_over - b_over_here)


# --- launchers ---


def draw_scores(
    pilots: tuple[Tensor, Tensor] | None,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    scale: float,
    random_key: int,
    exact_rows: int,
    layout: Layout,
) -> Tensor:
    """Scores whose highest `d` are `d` columns drawn without replacement.

    Args:
        pilots: `[B, H, r, p]` contiguous, in the dtype of `key`: the rows that eq. 5 of the paper looks at; and
            `[B, H, r]` float32, the logarithm of each one's mass. None: all columns are alike.
        key: `[B, HK, n_k, p]`, last stride 1.
        value: `[B, HK, n_k, pv]`, last stride 1.
        num_heads: `H`.
        scale: Multiplies the logits.
        random_key: Of `random.random_key`.
        exact_rows: The first keys, which are always taken.
        layout: The layout.

    Returns:
        `[B, H, n_k]` float32, by rank.
    """
    batch, kv_heads, n, p = key.shape
    pv, chunks = value.shape[-1], triton.cdiv(n, PIECE)
    out = torch.empty(batch, num_heads, n, dtype=torch.float32, device=key.device)
    conf = config("pilots", padded(p), padded(pv), like=key)
    rows, lse = pilots or (out, out)  # not read if all are alike
    draw_kernel[(batch * num_heads * chunks,)](
        rows, key, value, lse, layout.key_index, layout.key_length, layout.blocks, out,
        *key.stride()[:3], *value.stride()[:3], n, num_heads, num_heads // kv_heads, rows.shape[2], chunks, scale,
        random_key, exact_rows,
        p=p, pv=pv, P=padded(p), PV=padded(pv), PIECE=PIECE, BM=conf.rows, BN=conf.keys, UNIFORM=pilots is None,
        PRECISION=precision(key), num_warps=conf.warps, num_stages=conf.stages,
    )  # fmt: skip
    return out


def block_bias(
    key: Tensor, value: Tensor, key_mean: Tensor, value_mean: Tensor, covariance: Tensor, exact_rows: int,
    separate: bool, layout: Layout,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What is added to the logits of pilots when blocks choose columns.

    Args:
        key: `[B, HK, n_k, p]`, last stride 1.
        value: `[B, HK, n_k, pv]`, last stride 1.
        key_mean: `[B, HK, p]` float32.
        value_mean: `[B, HK, pv]` float32.
        covariance: `[B, H, p, p]` float32, of the queries about the pilots, times `scale² / 2`.
        exact_rows: The first keys, which are always taken.
        separate: Whether the spread of queries is wanted on its own.
        layout: The layout.

    Returns:
        `[B, H, n_k]` float32, by rank: the logarithm of the norms of values, plus, unless separate, the spread of
        queries along the keys; and the spread (undefined unless separate).
    """
    batch, heads, p, _ = covariance.shape
    n, pv, chunks = key.shape[2], value.shape[-1], triton.cdiv(key.shape[2], PIECE)
    bias = torch.empty(batch, heads, n, dtype=torch.float32, device=key.device)
    spread = torch.empty_like(bias) if separate else bias
    conf = config("bias", padded(p), padded(pv), like=key)
    bias_kernel[(batch * heads * chunks,)](
        key, value, key_mean, value_mean, covariance, layout.key_index, layout.key_length, layout.blocks, bias, spread,
        *key.stride()[:3], *value.stride()[:3], n, heads, heads // key.shape[1], chunks, exact_rows,
        p=p, pv=pv, P=padded(p), PV=padded(pv), BT=min(16, padded(p)), PIECE=PIECE, BN=conf.keys, SEPARATE=separate,
        PRECISION=precision(key), num_warps=conf.warps, num_stages=conf.stages,
    )  # fmt: skip
    return bias, spread


def top_columns(
    pilots: Tensor | None, key: Tensor, bias: Tensor, spread: Tensor, count: int, scale: float, layout: Layout
) -> Tensor:
    """The `count` columns of the highest score in each block, in ascending order.

    Args:
        pilots: `[B, H, blocks, parts, p]` contiguous, in the dtype of `key`. None: the bias is the score, and all
            blocks share their columns.
        key: `[B, HK, n_k, p]`, last stride 1.
        bias: `[B, H, n_k]` float32, by rank, added to the logarithm of the root mean square of the parts' attention
            (up to a constant, with one part).
        spread: Like `bias`, added to the logits before that, if there are several parts.
        count: `d`, fewer than the valid keys of every sequence that is sketched.
        scale: Multiplies the logits.
        layout: The layout.

    Returns:
        `[B, H, blocks, d]` int32, positions of keys; `blocks` is 1 without pilots. Zeros for blocks that a
        sequence does not have.
    """
    batch, heads, n = bias.shape
    p, device = key.shape[-1], key.device
    blocks, parts = (1, 0) if pilots is None else pilots.shape[2:4]
    conf = config("select", padded(p), like=key)
    most = max(1, min(_MOST_CHUNKS, _WORKSPACE // blocks, triton.cdiv(n, 512)))
    rows = triton.cdiv(triton.cdiv(n, most), conf.keys) * conf.keys
    chunks = triton.cdiv(n, rows)
    score_range = torch.empty(batch, heads, chunks, blocks, 2, dtype=torch.float32, device=device)
    histogram = torch.zeros(batch, heads, 1 + chunks, blocks, 256, dtype=torch.int32, device=device)
    above = torch.empty(batch, heads, chunks, blocks, dtype=torch.int32, device=device)
    before = torch.empty(batch, heads, chunks, blocks, 2, dtype=torch.int32, device=device)
    threshold = torch.empty(batch, heads, blocks, 2, dtype=torch.int32, device=device)
    out = torch.zeros(batch, heads, blocks, count, dtype=torch.int32, device=device)
    lse = bias
    if parts > 1:
        lse = log_sum_exp(pilots.flatten(2, 3), key, spread, scale, layout).view(batch, heads, blocks, parts)
        # The smallest block of a sequence may have fewer queries than it should have parts: those have no weight.
        present = layout.query_length // layout.blocks.clamp(min=1)
        missing = torch.arange(parts, device=device) >= present[:, None]
        lse = lse.masked_fill(missing[:, None, None], torch.inf)
    tile = conf.rows if parts else 1
    for stage in range(4):
        if stage == 3:
            offsets_kernel[(batch * heads, blocks)](
                histogram, above, before, threshold, layout.key_length, layout.blocks, heads, blocks, chunks, rows,
                d=count, SHARED=pilots is None, MOST_CHUNKS=_MOST_CHUNKS, num_warps=4,
            )  # fmt: skip
        select_kernel[(batch * heads * chunks, triton.cdiv(blocks, tile))](
            bias if pilots is None else pilots, key, bias, spread, lse,
            layout.key_index, layout.key_length, layout.blocks, score_range, histogram, above, before, threshold, out,
            *key.stride()[:3], n, heads, heads // key.shape[1], blocks, chunks, rows, scale,
            stage,
            d=count, p=p, P=padded(p), PARTS=parts, SHARED=pilots is None, MOST_CHUNKS=_MOST_CHUNKS,
            BG=tile, BN=conf.keys, PRECISION=precision(key), num_warps=conf.warps, num_stages=conf.stages,
        )  # fmt: skip
    return out
