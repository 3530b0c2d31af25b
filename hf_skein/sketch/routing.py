"""Routing: put queries that look for the same thing into one block (design of `method="adaptive"`).

A balanced binary tree splits a head's queries at a quantile of their top principal direction, again and again, until as
many leaves as blocks are left. It is deterministic: no random projection, a power iteration from a fixed start.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


ROUTING_COMPONENTS = 16
_SQUARINGS = 5  # the power iteration runs 2**5 steps, by repeated squaring of the covariance


class Blocks(NamedTuple):
    """Queries by block. Blocks differ in size by at most one; a short one repeats its last query in the spare slot.

    Attributes:
        index: `[h, blocks, size]` int64, the query in each slot.
        filled: `[blocks, size]` bool, False in a spare slot.
        slot: `[h, n_q]` int64, the (first) slot of each query in the flattened `[blocks * size]`.
    """

    index: Tensor
    filled: Tensor
    slot: Tensor


def num_blocks(num_queries: int, block_size: int, max_blocks: int) -> int:
    """Blocks for a sequence: of at most `block_size` queries, unless that were more than `max_blocks` blocks."""
    return min(max_blocks, -(-num_queries // block_size))


def _bounds(n: int, blocks: int, device: torch.device) -> Tensor:
    """`[blocks + 1]` first query rank of every leaf: sizes differ by at most one."""
    return torch.arange(blocks + 1, device=device) * n // blocks


def _segments(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Padded table of the ranks `start <= r < end`: `[segments, longest]` index and its validity."""
    lengths = end - start
    offsets = torch.arange(int(lengths.max()), device=start.device)
    valid = offsets < lengths[:, None]
    return start[:, None] + torch.minimum(offsets, lengths[:, None] - 1), valid


def principal_components(x: Tensor, components: int) -> Tensor:
    """Coordinates of centred `x` in its top principal components.

    Args:
        x: `[h, n, p]`.
        components: How many; at most `p` are returned.

    Returns:
        `[h, n, min(components, p)]`.
    """
    x = x - x.mean(-2, keepdim=True)
    if x.shape[-1] <= components:
        return x
    _, vectors = torch.linalg.eigh(_normalised(x.mT @ x))  # ascending eigenvalues
    return x @ vectors[..., -components:]


def _normalised(matrix: Tensor) -> Tensor:
    """`matrix` over its largest absolute entry (of the last two dimensions), which keeps powers in range."""
    return matrix / matrix.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def top_direction(covariance: Tensor) -> Tensor:
    """Top principal direction by power iteration, up to its length.

    The start is the column of the powered matrix with the largest diagonal: it cannot be orthogonal to the answer.

    Args:
        covariance: `[..., c, c]`, positive semidefinite.

    Returns:
        `[..., c]`.
    """
    power = _normalised(covariance)
    for _ in range(_SQUARINGS):
        power = _normalised(power @ power)
    start = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    return power.gather(-1, start[..., None, None].expand(*power.shape[:-1], 1)).squeeze(-1)


def route(query: Tensor, blocks: int) -> Blocks:
    """Order the queries of every head by the tree and cut them into blocks.

    Args:
        query: `[h, n, p]`, valid queries of one sequence.
        blocks: Number of blocks, between 1 and `n`.

    Returns:
        The blocks; see `Blocks`.
    """
    heads, n, _ = query.shape
    bounds = _bounds(n, blocks, query.device)
    order = torch.arange(n, device=query.device).expand(heads, n)
    if blocks > 1:
        # A query that is not finite must not cost the others their place; its own row stays what it is.
        points = principal_components(query.nan_to_num(0, 0, 0), ROUTING_COMPONENTS)
        leaves = torch.tensor([0, blocks], device=query.device)  # the nodes of this level are leaves[i] .. leaves[i+1]
        while (leaves.diff() > 1).any():
            order = _split_level(points, order, bounds[leaves])
            middles = (leaves[:-1] + leaves[1:]) // 2
            leaves = torch.unique(torch.cat([leaves, middles]))
    table, filled = _segments(bounds[:-1], bounds[1:])
    # Leaves are full from the left, so rank r of leaf g sits in slot g * size + (r - first rank of g).
    slot_of_rank = torch.arange(table.numel(), device=query.device).view_as(table)[filled]
    slot = torch.empty_like(order).scatter_(1, order, slot_of_rank.expand(heads, n))
    return Blocks(order[:, table], filled, slot)


def _split_level(points: Tensor, order: Tensor, first: Tensor) -> Tensor:
    """Sort every node (ranks `first[i]` to `first[i+1]`) of every head along its own top principal direction."""
    heads, n, components = points.shape
    table, valid = _segments(first[:-1], first[1:])
    members = order[:, table]  # [h, nodes, m]
    row = members + n * torch.arange(heads, device=order.device)[:, None, None]
    x = points.flatten(0, 1).index_select(0, row.flatten()).view(heads, *table.shape, components)
    if not valid.all():
        x = x * valid[..., None]
    total = x.sum(-2)
    covariance = x.mT @ x - total[..., :, None] * (total / valid.sum(-1)[:, None])[..., None, :]
    projection = (x @ top_direction(covariance)[..., None]).squeeze(-1)
    projection = projection.nan_to_num().masked_fill(~valid, torch.inf)  # spare slots sort last
    rank = projection.sort(dim=-1, stable=True).indices
    return members.gather(-1, rank)[:, valid]
