"""Columns: for every block the `d` keys of the highest score.

One pass over keys and values writes the scores of some heads into a workspace of fixed size, and puts every key into
its stratum on the way; then one program per block finds its columns, and the next heads follow. A program reads its
scores four times, while they are in a cache: it finds their range; counts, as 16-bit integers at even spacing between
the lowest and the highest finite score, their upper bytes and then the lower bytes of those at the threshold, which
gives that of the `d`-th; and writes the columns. Equal scores go by position. No program shares a counter with another,
so the result is the same in every run, and in ascending order. A heap would be serial, sorting moves more than this
reads, and a threshold sampled beforehand can miss.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout
from .pilots import PIECE, log_sum_exp
from .random import COLUMN_STREAM, gumbel, uniform
from .strata import means_tile, nearest_stratum
from .tiles import LOG2_E, bin_of_rank, config, dot, load_rows, padded, precision


WORKSPACE = 2**28  # bytes; but at least the scores of one tile of blocks
_PIECE = 512  # keys of one program
_BLOCKS = 16  # of one tile of scores: tensor cores take no fewer
_TILE = 2048  # scores of a block that are looked at together


# --- kernels ---


@triton.jit
def log_norm(b_v):
    """Logarithm of the norm of each row, `[N]`."""
    return 0.5 * tl.log(tl.sum(b_v * b_v, 1))


@triton.jit
def spread_along(
    b_k, p_k, p_key_mean, p_covariance, stride_n, o_n, m_n,
    p: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`kᵀCk` of some keys `[N, P]`, less their mean: `[N]`."""
    o_p = tl.arange(0, P)
    b_centred = b_k.to(tl.float32) - tl.load(p_key_mean + o_p, mask=o_p < p, other=0.0)[None, :]
    b_spread = tl.zeros([o_n.shape[0]], tl.float32)
    for first in range(0, P, BT):
        o_t = first + tl.arange(0, BT)
        b_mean = tl.load(p_key_mean + o_t, mask=o_t < p, other=0.0)
        # [P, BT], [N, BT]
        b_covariance = load_rows(p_covariance, p, o_p, o_p < p, o_t, o_t < p)
        b_t = load_rows(p_k, stride_n, o_n, m_n, o_t, o_t < p).to(tl.float32) - b_mean[None, :]
        b_spread += tl.sum(dot(b_centred, b_covariance, None, PRECISION) * b_t, 1)
    return b_spread


@triton.jit
def spread_kernel(
    p_k, p_key_mean, p_covariance, p_index, p_length, p_blocks, p_out, stride_b, stride_h, stride_n, n, HEADS, GROUP,
    CHUNKS,
    p: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, PIECE: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By rank: the spread of queries along each key."""
    i_chunk, i_bh = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    if tl.load(p_blocks + i_b) == 0:
        return
    length = tl.load(p_length + i_b)
    p_k += i_b * stride_b + (i_h // GROUP) * stride_h
    for first in range(i_chunk * PIECE, tl.minimum(i_chunk * PIECE + PIECE, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
        o_p = tl.arange(0, P)
        b_k = load_rows(p_k, stride_n, o_n, m_rank, o_p, o_p < p)
        b_spread = spread_along(
            b_k, p_k, p_key_mean + (i_bh // GROUP) * p, p_covariance + i_bh * p * p, stride_n, o_n, m_rank, p, P, BT,
            PRECISION,
        )  # fmt: skip
        tl.store(p_out + i_bh * n + o_rank, b_spread, mask=m_rank)


@triton.jit(do_not_specialize=["first_head", "first_block", "end_block"])
def score_kernel(
    p_pilots, p_k, p_v, p_key_mean, p_value_mean, p_covariance, p_means, p_spread, p_lse, p_index, p_length, p_blocks,
    p_score, p_stratum,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, n, HEADS, GROUP, CHUNKS, exact_rows, scale,
    first_head, first_block, end_block, BLOCKS,
    p: tl.constexpr, pv: tl.constexpr, P: tl.constexpr, PV: tl.constexpr, c: tl.constexpr,
    PARTS: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, PIECE: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[.., end_block - first_block, n]`, by rank, of keys in some blocks of the heads from `first_head` on: the
    logarithm of the root mean square of the PARTS pilots' attention (up to a constant, with one pilot), plus that of
    the norm of the value about its mean. Infinite for the first `exact_rows` keys, which are always taken.

    The strata of keys on the way, if there are several.
    """
    i_chunk, i_here = tl.program_id(0) % CHUNKS, (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_bh = first_head + i_here
    i_b, i_h, i_kv = i_bh // HEADS, i_bh % HEADS, i_bh // GROUP  # HEADS is GROUP times the number of key heads
    blocks, length = tl.load(p_blocks + i_b), tl.load(p_length + i_b)
    if blocks == 0:
        return
    p_k += i_b * k_stride_b + (i_h // GROUP) * k_stride_h
    p_v += i_b * v_stride_b + (i_h // GROUP) * v_stride_h
    p_pilots += i_bh * BLOCKS * PARTS * p
    p_lse += i_bh * BLOCKS * PARTS
    p_score += i_here * (end_block - first_block) * n
    o_p, o_v = tl.arange(0, P), tl.arange(0, PV)
    for first in range(i_chunk * PIECE, tl.minimum(i_chunk * PIECE + PIECE, length), BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
        # [BN, P], [BN, PV]
        b_k = load_rows(p_k, k_stride_n, o_n, m_rank, o_p, o_p < p)
        b_v = load_rows(p_v, v_stride_n, o_n, m_rank, o_v, o_v < pv).to(tl.float32)
        b_bias = log_norm(b_v - tl.load(p_value_mean + i_kv * pv + o_v, mask=o_v < pv, other=0.0)[None, :])
        if PARTS == 1:
            b_spread = spread_along(
                b_k, p_k, p_key_mean + i_kv * p, p_covariance + i_bh * p * p, k_stride_n, o_n, m_rank, p, P, BT,
                PRECISION,
            )  # fmt: skip
            b_bias += b_spread
        else:
            b_spread = tl.load(p_spread + i_bh * n + o_rank, mask=m_rank, other=0.0)
        b_bias = tl.where(o_rank < exact_rows, float("inf"), b_bias)
        if c > 1:  # noqa: SIM102 -- known when compiled
            if i_h % GROUP == 0:
                b_stratum = nearest_stratum(
                    b_k, p_means + i_kv * c * p, p_k, p_index, k_stride_n, p_key_mean + i_kv * p, length, p, P, c, BC,
                    False, PRECISION,
                )  # fmt: skip
                tl.store(p_stratum + i_kv * n + o_n, b_stratum, mask=m_rank)
        for g in range(first_block, tl.minimum(end_block, blocks), BG):
            o_g = g + tl.arange(0, BG)
            m_g = o_g < tl.minimum(end_block, blocks)
            if PARTS == 1:
                # [BG, P]
                b_pilots = load_rows(p_pilots, p, o_g, m_g, o_p, o_p < p)
                b_score = dot(b_k, tl.trans(b_pilots), None, PRECISION) * scale
            else:
                b_largest, b_sum = tl.full([BN, BG], -1e38, tl.float32), tl.zeros([BN, BG], tl.float32)
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
            p_tile = p_score + (o_g - first_block).to(tl.int64)[None, :] * n + o_rank[:, None]
            tl.store(p_tile, b_score + b_bias[:, None], mask=m_rank[:, None] & m_g[None, :])


@triton.jit(do_not_specialize=["key"])
def draw_kernel(
    p_q, p_rows, p_lse, p_k, p_v, p_index, p_length, p_blocks, p_out,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n, HEADS, GROUP, PILOTS, CHUNKS, scale, key, exact_rows,
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
                b_lse = tl.load(p_lse + i_bh * PILOTS + o_m, mask=o_m < PILOTS, other=0.0) / LOG2_E
                o_row = tl.load(p_rows + i_bh * PILOTS + o_m, mask=o_m < PILOTS, other=0)
                # [BM, P]
                p_head = p_q + i_b * q_stride_b + i_h * q_stride_h
                b_pilots = load_rows(p_head, q_stride_n, o_row, o_m < PILOTS, o_p, o_p < p)
                b_square = 2.0 * (dot(b_k, tl.trans(b_pilots), None, PRECISION) * scale - b_lse[None, :])
                b_square = tl.where((o_m < PILOTS)[None, :], b_square, float("-inf"))
                b_new = tl.maximum(b_largest, tl.max(b_square, 1))
                b_sum = b_sum * tl.exp(b_largest - b_new) + tl.sum(tl.exp(b_square - b_new[:, None]), 1)
                b_largest = b_new
            b_score += 0.5 * (b_largest + tl.log(b_sum)) + log_norm(b_v)
        b_score = tl.where(o_rank < exact_rows, float("inf"), b_score)
        tl.store(p_out + i_bh * n + o_rank, b_score, mask=m_rank)


@triton.jit
def load_codes(p_score, o_rank, m_rank, low, unit):
    """Scores as 16-bit integers, the highest first; those that are `-inf` or NaN last."""
    b_score = tl.load(p_score + o_rank, mask=m_rank, other=float("-inf"))
    m_finite = tl.abs(b_score) < float("inf")
    b_code = tl.minimum(tl.maximum((b_score - low) * unit, 0.0), 65533.0)
    b_code = 65534 - tl.where(m_finite, b_code, 0.0).to(tl.int32)
    return tl.where(m_finite, b_code, tl.where(b_score == float("inf"), 0, 65535))


@triton.jit(do_not_specialize=["first_head", "first_block"])
def top_kernel(
    p_score, p_index, p_length, p_blocks, p_out, n, HEADS, first_head, first_block, ROOM, AT_ONCE, d,
    BN: tl.constexpr,
):  # fmt: skip
    """The columns of one block: the first `d` of the codes."""
    i_here, i_bh = tl.program_id(0).to(tl.int64), first_head + tl.program_id(0).to(tl.int64)
    i_b, i_g = i_bh // HEADS, first_block + tl.program_id(1)
    length, blocks = tl.load(p_length + i_b), tl.load(p_blocks + i_b)
    if i_g >= blocks:
        return
    p_score += (i_here * AT_ONCE + tl.program_id(1)) * n
    b_low, b_high = tl.full([BN], float("inf"), tl.float32), tl.full([BN], float("-inf"), tl.float32)
    for first in range(0, length, BN):
        o_rank = first + tl.arange(0, BN)
        b_score = tl.load(p_score + o_rank, mask=o_rank < length, other=float("inf"))
        m_finite = tl.abs(b_score) < float("inf")
        b_low = tl.minimum(b_low, tl.where(m_finite, b_score, float("inf")))
        b_high = tl.maximum(b_high, tl.where(m_finite, b_score, float("-inf")))
    low = tl.min(b_low, 0)
    unit = 65533.0 / tl.maximum(tl.max(b_high, 0) - low, 1e-30)
    b_histogram = tl.zeros([256], tl.int32)
    for first in range(0, length, BN):
        o_rank = first + tl.arange(0, BN)
        b_code = load_codes(p_score, o_rank, o_rank < length, low, unit)
        b_histogram += tl.histogram(b_code >> 8, 256, mask=o_rank < length)
    upper_bits, before = bin_of_rank(b_histogram, d)
    b_histogram = tl.zeros([256], tl.int32)
    for first in range(0, length, BN):
        o_rank = first + tl.arange(0, BN)
        b_code = load_codes(p_score, o_rank, o_rank < length, low, unit)
        b_histogram += tl.histogram(b_code & 255, 256, mask=(o_rank < length) & (b_code >> 8 == upper_bits))
    lower_bits, before_here = bin_of_rank(b_histogram, d - before)
    last = upper_bits * 256 + lower_bits
    ties = d - before - before_here  # keys of that code that are taken
    taken, seen = length * 0, length * 0
    for first in range(0, length, BN):
        o_rank = first + tl.arange(0, BN)
        m_rank = o_rank < length
        b_code = load_codes(p_score, o_rank, m_rank, low, unit)
        b_tie = ((b_code == last) & m_rank).to(tl.int32)
        b_taken = (b_code < last) | ((b_code == last) & (seen + tl.cumsum(b_tie, 0) <= ties))
        b_taken = (b_taken & m_rank).to(tl.int32)
        o_slot = taken + tl.cumsum(b_taken, 0) - b_taken
        o_n = tl.load(p_index + i_b * n + o_rank, mask=m_rank, other=0)
        tl.store(p_out + (i_bh * ROOM + i_g) * d + o_slot, o_n, mask=b_taken == 1)
        taken += tl.sum(b_taken, 0)
        seen += tl.sum(b_tie, 0)


# --- launchers ---


def draw_scores(
    pilots: tuple[Tensor, Tensor] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    random_key: int,
    exact_rows: int,
    layout: Layout,
) -> Tensor:
    """Scores whose highest `d` are `d` columns drawn without replacement.

    Args:
        pilots: `[B, H, r]` int32, positions of the queries that eq. 5 of the paper looks at; and `[B, H, r]` float32,
            the logarithm to base 2 of each one's mass. None: all columns are alike.
        query: `[B, H, n_q, p]`, last stride 1.
        key: `[B, HK, n_k, p]`, last stride 1.
        value: `[B, HK, n_k, pv]`, last stride 1.
        scale: Multiplies the logits.
        random_key: Of `random.random_key`.
        exact_rows: The first keys, which are always taken.
        layout: The layout.

    Returns:
        `[B, H, n_k]` float32, by rank.
    """
    batch, heads, _, p = query.shape
    n, pv, chunks = key.shape[2], value.shape[-1], triton.cdiv(key.shape[2], PIECE)
    out = torch.empty(batch, heads, n, dtype=torch.float32, device=key.device)
    conf = config("pilots", padded(p), padded(pv), like=key)
    rows, lse = pilots or (layout.query_index, out)  # not read if all are alike
    draw_kernel[(batch * heads * chunks,)](
        query, rows, lse, key, value, layout.key_index, layout.key_length, layout.blocks, out,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], n, heads, heads // key.shape[1], rows.shape[-1],
        chunks, scale, random_key, exact_rows,
        p=p, pv=pv, P=padded(p), PV=padded(pv), PIECE=PIECE, BM=conf.rows, BN=conf.keys, UNIFORM=pilots is None,
        PRECISION=precision(key), num_warps=conf.warps, num_stages=conf.stages,
    )  # fmt: skip
    return out


def block_columns(
    pilots: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_mean: Tensor,
    covariance: Tensor,
    strata: Tensor,
    count: int,
    scale: float,
    exact_rows: int,
    room: int,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """The `count` columns of the highest score in each block, in ascending order, and the strata of all keys.

    Args:
        pilots: `[B, H, blocks, parts, p]` contiguous, in the dtype of `key`.
        key: `[B, HK, n_k, p]`, last stride 1.
        value: `[B, HK, n_k, pv]`, last stride 1.
        key_mean: `[B, HK, p]` float32.
        value_mean: `[B, HK, pv]` float32.
        covariance: `[B, H, p, p]` float32, of the queries about the pilots, times `scale² / 2`.
        strata: `[B, HK, strata, p]` float32, of `strata.means`.
        count: `d`, fewer than the valid keys of every sequence that is sketched.
        scale: Multiplies the logits.
        exact_rows: The first keys, which are always taken.
        room: Blocks that the result has room for.
        layout: The layout.

    Returns:
        `[B, H, room, d]` int32, positions of keys, zeros for blocks that a sequence does not have; and
        `[B, HK, n_k]` int32, zeros where a key is padding or its sequence is not sketched.
    """
    batch, heads, blocks, parts, p = pilots.shape
    kv_heads, n, pv = value.shape[1:]
    num_strata, chunks, device = strata.shape[2], triton.cdiv(n, _PIECE), key.device
    keys = layout.key_index, layout.key_length, layout.blocks
    spread = lse = covariance  # not read with one part
    if parts > 1:
        spread, lse = _of_parts(pilots, key, key_mean, covariance, scale, layout)
    stratum = torch.zeros(batch, kv_heads, n, dtype=torch.int32, device=device)
    columns = torch.zeros(batch, heads, room, count, dtype=torch.int32, device=device)
    blocks_at_once, heads_at_once = at_once(batch * heads, blocks, n)
    score = torch.empty(heads_at_once, blocks_at_once, n, dtype=torch.float32, device=device)
    conf = config("score", padded(p), padded(pv), like=key)
    for first_head in range(0, batch * heads, heads_at_once):
        some = min(heads_at_once, batch * heads - first_head)
        for first_block in range(0, blocks, blocks_at_once):
            score_kernel[(some * chunks,)](
                pilots, key, value, key_mean, value_mean, covariance, strata, spread, lse, *keys, score, stratum,
                *key.stride()[:3], *value.stride()[:3], n, heads, heads // kv_heads, chunks, exact_rows, scale,
                first_head, first_block, first_block + blocks_at_once, blocks,
                p=p, pv=pv, P=padded(p), PV=padded(pv), c=num_strata, PARTS=parts, BG=_BLOCKS,
                BC=means_tile(key, num_strata), BT=min(conf.rows, padded(p)), PIECE=_PIECE, BN=conf.keys,
                PRECISION=precision(key), num_warps=conf.warps, num_stages=conf.stages,
            )  # fmt: skip
            _top(score[:some], columns, first_head, first_block, blocks, layout)
    return columns, stratum


def shared_columns(score: Tensor, count: int, layout: Layout) -> Tensor:
    """The `count` columns of the highest score, in ascending order, for all blocks alike.

    Args:
        score: `[B, H, n_k]` float32 contiguous, by rank.
        count: `d`, fewer than the valid keys of every sequence that is sketched.
        layout: The layout.

    Returns:
        `[B, H, 1, d]` int32, positions of keys; zeros for sequences that are not sketched.
    """
    columns = torch.zeros(*score.shape[:2], 1, count, dtype=torch.int32, device=score.device)
    _top(score.flatten(0, 1)[:, None], columns, 0, 0, 1, layout)
    return columns


def at_once(heads: int, blocks: int, n: int) -> tuple[int, int]:
    """How many blocks of how many heads have their scores of `n` keys in the workspace."""
    fit = WORKSPACE // (4 * max(n, 1))
    blocks = min(blocks, max(fit // _BLOCKS, 1) * _BLOCKS)
    return blocks, max(1, min(heads, fit // blocks))


def _of_parts(
    pilots: Tensor, key: Tensor, key_mean: Tensor, covariance: Tensor, scale: float, layout: Layout
) -> tuple[Tensor, Tensor]:
    """The spread of queries along every key `[B, H, n_k]`, by rank, and the logarithm of the mass of every pilot
    `[B, H, blocks, parts]`, infinite for a part that a sequence lacks. Arguments as in `block_columns`."""
    batch, heads, blocks, parts, p = pilots.shape
    n, chunks = key.shape[2], triton.cdiv(key.shape[2], _PIECE)
    spread = torch.empty(batch, heads, n, dtype=torch.float32, device=key.device)
    conf = config("score", padded(p), like=key)
    spread_kernel[(batch * heads * chunks,)](
        key, key_mean, covariance, layout.key_index, layout.key_length, layout.blocks, spread, *key.stride()[:3], n,
        heads, heads // key.shape[1], chunks,
        p=p, P=padded(p), BT=min(conf.rows, padded(p)), PIECE=_PIECE, BN=conf.keys, PRECISION=precision(key),
        num_warps=conf.warps, num_stages=conf.stages,
    )  # fmt: skip
    lse = log_sum_exp(pilots.flatten(2, 3), key, spread, scale, layout).view(batch, heads, blocks, parts)
    # The smallest block of a sequence may have fewer queries than it should have parts: those have no weight.
    present = layout.query_length // layout.blocks.clamp(min=1)
    missing = torch.arange(parts, device=key.device) >= present[:, None]
    return spread, lse.masked_fill(missing[:, None, None], torch.inf)


def _top(score: Tensor, columns: Tensor, first_head: int, first_block: int, blocks: int, layout: Layout) -> None:
    """Write the columns of the blocks from `first_block` on, of the heads from `first_head` on, whose scores
    `[heads, blocks, n_k]` are."""
    some, at_a_time, n = score.shape
    heads, room, count = columns.shape[1:]
    top_kernel[(some, min(at_a_time, blocks - first_block))](
        score, layout.key_index, layout.key_length, layout.blocks, columns, n, heads, first_head, first_block, room,
        at_a_time, count, BN=_TILE, num_warps=8,
    )  # fmt: skip
