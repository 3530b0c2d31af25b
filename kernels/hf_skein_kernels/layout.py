"""Ragged batches without synchronisation: where the valid tokens are and how many blocks they make, on the device.

Shapes and grids depend on the padded lengths only; what a sequence needs is read by the kernels from these tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
        exact_output: `[B, H, r, pv]` float32, the exact rows where choosing the columns gave them; else `r` is 0.
        exact_lse: `[B, H, r]` float32, the logarithm to base 2 of their mass, likewise.
    """

    order: Tensor
    columns: Tensor
    exact_rows: Tensor
    stratum: Tensor
    exact_output: Tensor
    exact_lse: Tensor


def mark_exact(selection: Selection) -> Selection:
    """`selection` with exact rows marked in `order`."""
    rows, order, n = selection.exact_rows, selection.order.long(), selection.order.shape[-1]
    is_exact = torch.zeros(*order.shape[:2], n + 1, dtype=torch.bool, device=order.device)
    # Whatever stands where nothing is defined must not lead astray.
    is_exact.scatter_(2, torch.where((rows < 0) | (rows > n), n, rows).long(), True)
    order = torch.where(is_exact.gather(2, order.clamp(0, n)), -1 - order, order)
    return selection._replace(order=order.int())


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
    query_index, query_length = _valid_first(query_mask, query)
    key_index, key_length = _valid_first(key_mask, key)
    exponent = torch.zeros_like(query_length)
    most = num_blocks(query.shape[2], block_size, max_blocks).bit_length() - 1
    for i in range(most):  # the least lengths that make 2, 4, 8 ... blocks
        exponent += query_length >= max(block_size * 2**i + 1, 2 ** (i + 1))
    sketched = (key_length > exact_length) & (query_length > 0)
    return Layout(query_index, query_length, key_index, key_length, (2**exponent * sketched).int())


def _valid_first(mask: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    batch, n = x.shape[0], x.shape[2]
    if mask is None:
        index = torch.arange(n, device=x.device, dtype=torch.int32).expand(batch, n).contiguous()
        return index, torch.full((batch,), n, device=x.device, dtype=torch.int32)
    # Kernels address it without strides, and sorting would keep those of a transposed mask.
    index = torch.sort((~mask).byte().contiguous(), dim=-1, stable=True).indices
    return index.int(), mask.sum(-1, dtype=torch.int32)
