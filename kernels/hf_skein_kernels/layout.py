"""Ragged batches without synchronisation: where the valid tokens are and how many blocks they make, on the device.

Shapes and grids depend on the padded lengths only; what a sequence needs is read by the kernels from these tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


CHUNK = 4096  # positions of one program


class Layout(NamedTuple):
    """Valid tokens of every sequence; all int32.

    Attributes:
        query_index: `[B, n_q]`, positions of the queries, valid ones first and in order.
        query_length: `[B]`, how many are valid.
        key_index: `[B, n_k]`, likewise for keys.
        key_length: `[B]`.
        blocks: `[B]`, blocks of queries; 0 for a sequence that is not sketched: one that is computed exactly, or that
            has no valid query or no valid key.
    """

    query_index: Tensor
    query_length: Tensor
    key_index: Tensor
    key_length: Tensor
    blocks: Tensor


class Selection(NamedTuple):
    """What a method selects; int32 positions in the padded inputs. Undefined for sequences without blocks.

    Block `g` of a sequence with `L` valid queries in `G` blocks holds the ranks `g * L // G <= r < (g + 1) * L // G` of
    `order`.

    Attributes:
        order: `[B, H, n_q]`, query positions block by block, valid ones first; `-1 - position` for an exact row.
        columns: `[B, H, blocks, d]`, key positions.
        exact_rows: `[B, H, r]`, query positions computed over all keys; -1 where there is none, and in place of what
            has come before.
        stratum: `[B, HK, n_k]`, the stratum of the key at each position.
        exact_output: `[B, H, r, pv]` float32, the exact rows.
        exact_lse: `[B, H, r]` float32, the logarithm to base 2 of their mass.
    """

    order: Tensor
    columns: Tensor
    exact_rows: Tensor
    stratum: Tensor
    exact_output: Tensor
    exact_lse: Tensor


# --- kernels ---


@triton.jit
def valid_first(p_mask, p_index, stride, n, i_chunk, MASKED: tl.constexpr, CHUNK: tl.constexpr):
    """Write the places of a chunk of positions, valid ones first; the number of valid ones in all."""
    o_n = i_chunk * CHUNK + tl.arange(0, CHUNK)
    o_place, count = o_n, n
    if MASKED:
        b_all, b_before = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)
        for first in range(0, n, CHUNK):
            o_i = first + tl.arange(0, CHUNK)
            b_i = (tl.load(p_mask + o_i.to(tl.int64) * stride, mask=o_i < n, other=0) != 0).to(tl.int32)
            b_all += b_i
            b_before += tl.where(first < i_chunk * CHUNK, b_i, 0)
        b_valid = (tl.load(p_mask + o_n.to(tl.int64) * stride, mask=o_n < n, other=0) != 0).to(tl.int32)
        o_rank = tl.sum(b_before, 0) + tl.cumsum(b_valid, 0) - b_valid
        count = tl.sum(b_all, 0)
        o_place = tl.where(b_valid == 1, o_rank, count + o_n - o_rank)
    tl.store(p_index + o_place, o_n, mask=o_n < n)
    return count


@triton.jit(do_not_specialize=["block_size", "exact_length"])
def layout_kernel(
    p_query_mask, p_key_mask, p_query_index, p_query_length, p_key_index, p_key_length, p_blocks,
    query_stride_b, query_stride_n, key_stride_b, key_stride_n, n_q, n_k, block_size, doublings, exact_length,
    QUERY_MASKED: tl.constexpr, KEY_MASKED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_b, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query_length = valid_first(
        p_query_mask + i_b * query_stride_b, p_query_index + i_b * n_q, query_stride_n, n_q, i_chunk, QUERY_MASKED,
        CHUNK,
    )  # fmt: skip
    key_length = valid_first(
        p_key_mask + i_b * key_stride_b, p_key_index + i_b * n_k, key_stride_n, n_k, i_chunk, KEY_MASKED, CHUNK
    )
    if i_chunk == 0:
        tl.store(p_query_length + i_b, query_length)
        tl.store(p_key_length + i_b, key_length)
        blocks = tl.full([], 1, tl.int64)  # as `num_blocks`
        for _ in range(doublings):
            blocks = tl.where((query_length > block_size * blocks) & (query_length >= 2 * blocks), 2 * blocks, blocks)
        is_sketched = (key_length > exact_length) & (query_length > 0)
        tl.store(p_blocks + i_b, tl.where(is_sketched, blocks, 0).to(tl.int32))


@triton.jit
def mark_kernel(
    p_in, p_out, p_rows, p_index, p_length, in_stride_b, in_stride_h, n, HEADS, ROWS,
    FIRST: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The order with exact rows marked; with FIRST these are the first valid queries, which are written, too."""
    i_chunk, i_bh = tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // HEADS, i_bh % HEADS
    o_n = i_chunk * BN + tl.arange(0, BN)
    b_order = tl.load(p_in + i_b * in_stride_b + i_h * in_stride_h + o_n, mask=o_n < n, other=0)
    b_marks = tl.zeros([BN], tl.int32)
    for first in range(0, R, BR):
        o_r = first + tl.arange(0, BR)
        if FIRST:
            length = tl.load(p_length + i_b)
            b_rows = tl.load(p_index + i_b * n + o_r, mask=o_r < tl.minimum(ROWS, length), other=-1)
            if i_chunk == 0:
                tl.store(p_rows + i_bh * ROWS + o_r, b_rows, mask=o_r < ROWS)
        else:
            b_rows = tl.load(p_rows + i_bh * ROWS + o_r, mask=o_r < ROWS, other=-1)
        b_marks += tl.sum((b_order[:, None] == b_rows[None, :]).to(tl.int32), 1)
    tl.store(p_out + i_bh * n + o_n, tl.where(b_marks > 0, -1 - b_order, b_order), mask=o_n < n)


# --- launchers ---


def mark_exact(order: Tensor, rows: Tensor | int, layout: Layout) -> tuple[Tensor, Tensor]:
    """The order of `Selection` with exact rows marked, and these rows.

    Args:
        order: `[B, H, n_q]` int32, last stride 1: positions, none of them marked.
        rows: `[B, H, r]` int32, positions of exact rows, -1 where there is none; or how many of the first valid
            queries are.
        layout: Of the batch.
    """
    batch, heads, n = order.shape
    is_first = isinstance(rows, int)
    if is_first:
        rows = order.new_empty(batch, heads, min(rows, n))
    count = rows.shape[-1]
    if count == 0:
        return order.clone(memory_format=torch.contiguous_format), rows  # results of an operator share no memory
    out = torch.empty_like(order, memory_format=torch.contiguous_format)
    size = max(16, triton.next_power_of_2(count))
    mark_kernel[(batch * heads, triton.cdiv(n, 256))](
        order, out, rows, layout.query_index, layout.query_length, *order.stride()[:2], n, heads, count,
        FIRST=is_first, R=size, BR=16, BN=256, num_warps=4,
    )  # fmt: skip
    return out, rows


def num_blocks(num_queries: int, block_size: int, max_blocks: int) -> int:
    """Blocks of a sequence, a power of two: of at most `block_size` queries, unless there were too many blocks.

    It never falls when `num_queries` grows, so that the blocks of the padded length are enough for every sequence.
    """
    wanted = -(-num_queries // block_size)
    return 1 << min((wanted - 1).bit_length(), min(max_blocks, num_queries).bit_length() - 1)


def ragged(
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    block_size: int,
    max_blocks: int,
    exact_length: int,
) -> Layout:
    """The layout of a batch.

    Args:
        query_mask: `[B, n_q]` bool, True for valid queries; None if all are.
        key_mask: `[B, n_k]` bool, likewise.
        query: `[B, H, n_q, p]`, only its shape and device are used.
        key: `[B, HK, n_k, p]`, likewise.
        block_size: As in `num_blocks`.
        max_blocks: As in `num_blocks`.
        exact_length: Most valid keys of a sequence that is computed exactly.
    """
    batch, _, n_q, _ = query.shape
    n_k, device = key.shape[2], key.device
    sizes = (batch, n_q), (batch,), (batch, n_k), (batch,), (batch,)
    out = Layout(*(torch.empty(*size, dtype=torch.int32, device=device) for size in sizes))
    masks = [
        x if mask is None else mask.bool().view(torch.uint8) for mask, x in ((query_mask, out[0]), (key_mask, out[2]))
    ]
    layout_kernel[(batch, triton.cdiv(max(n_q, n_k), CHUNK))](
        *masks, *out, *masks[0].stride(), *masks[1].stride(), n_q, n_k, block_size,
        num_blocks(n_q, block_size, max_blocks).bit_length() - 1, exact_length,
        QUERY_MASKED=query_mask is not None, KEY_MASKED=key_mask is not None, CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    return out
