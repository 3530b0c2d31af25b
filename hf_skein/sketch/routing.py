"""Routing: put queries that look for the same thing into one block (design of `method="adaptive"`).

A balanced binary tree splits a head's queries at the median of the coordinate that varies most, again and again, until
as many leaves as blocks are left. The coordinates are the top principal components of the logits: two queries are as
far apart as the logits that they give. It is deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gather import gather_rows, sample_rows


ROUTING_COMPONENTS = 8
_SUBSPACE_ITERATIONS = 2
_STRIDE = 5  # in a large node, every so many queries are looked at for the variance
_SAMPLE = 512  # queries and keys that the components are taken from


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
    """Blocks for a sequence, a power of two: of at most `block_size` queries, unless there were too many blocks."""
    wanted = -(-num_queries // block_size)
    return 1 << min((wanted - 1).bit_length(), min(max_blocks, num_queries).bit_length() - 1)


def _segments(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Padded table of the ranks `start <= r < end`: `[segments, longest]` index and its validity."""
    lengths = end - start
    offsets = torch.arange(int(lengths.max()), device=start.device)
    valid = offsets < lengths[:, None]
    return start[:, None] + torch.minimum(offsets, lengths[:, None] - 1), valid


def _normalised(matrix: Tensor) -> Tensor:
    """`matrix` over its largest absolute entry (of the last two dimensions), which keeps powers in range."""
    return matrix / matrix.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def logit_components(query: Tensor, key: Tensor, components: int) -> Tensor:
    """Top principal components of the queries, measured by the logits that they give.

    With `Σ = KᵀK = L Lᵀ`, the distance of `Lᵀq` and `Lᵀq'` is that of their logits over all keys. The components are
    found by subspace iteration from a fixed start, on queries and keys at even spacing.

    Args:
        query: `[h, n_q, p]`.
        key: `[h, n_k, p]`, with mean zero.
        components: How many; at most `p` are returned.

    Returns:
        `[h, n_q, min(components, p)]`, up to a factor per head and a constant per component.
    """
    p = query.shape[-1]
    keys = sample_rows(key, _SAMPLE)
    queries = sample_rows(query, _SAMPLE).nan_to_num(0, 0, 0)
    metric = _normalised(keys.mT @ keys)
    # A little on the diagonal, because keys may span less than all dimensions.
    ridge = 1e-5 * torch.eye(p, dtype=metric.dtype, device=metric.device)
    factor = torch.linalg.cholesky_ex(metric + ridge).L.nan_to_num(0, 0, 0)
    queries = queries - queries.mean(1, keepdim=True)
    covariance = _normalised(factor.mT @ _normalised(queries.mT @ queries) @ factor)
    start = covariance.diagonal(dim1=-2, dim2=-1).topk(min(components, p)).indices
    basis = covariance.gather(-1, start[:, None].expand(-1, p, -1))
    for _ in range(_SUBSPACE_ITERATIONS):
        basis = covariance @ torch.linalg.qr(basis).Q
    direction = factor @ torch.linalg.qr(basis).Q
    # Its sign is arbitrary, but decides which part of an uneven split is the larger one.
    largest = direction.gather(-2, direction.abs().argmax(-2, keepdim=True))
    return query @ (direction * largest.sign())


def route(query: Tensor, key: Tensor, blocks: int) -> Blocks:
    """Order the queries of every head by the tree and cut them into blocks.

    Args:
        query: `[h, n_q, p]`, valid queries of one sequence.
        key: `[h, n_k, p]`, with mean zero.
        blocks: Number of blocks, a power of two, at most `n_q`.

    Returns:
        The blocks; see `Blocks`.
    """
    heads, n, _ = query.shape
    bounds = torch.arange(blocks + 1, device=query.device) * n // blocks  # first rank of every leaf
    order = torch.arange(n, device=query.device).expand(heads, n)
    if blocks > 1:
        # A query that is not finite must not cost the others their place; its own row stays what it is.
        points = logit_components(query, key, ROUTING_COMPONENTS).nan_to_num(0, 0, 0)
        leaves = blocks  # of a node
        while leaves > 1:
            order = _split_level(points, order, bounds[::leaves], bounds[leaves // 2 :: leaves])
            leaves //= 2
    table, filled = _segments(bounds[:-1], bounds[1:])
    # Leaves are full from the left, so rank r of leaf g sits in slot g * size + (r - first rank of g).
    slot_of_rank = torch.arange(table.numel(), device=query.device).view_as(table)[filled]
    slot = torch.empty_like(order).scatter_(1, order, slot_of_rank.expand(heads, n))
    return Blocks(order.index_select(1, table.flatten()).unflatten(1, table.shape), filled, slot)


def _split_level(points: Tensor, order: Tensor, first: Tensor, middle: Tensor) -> Tensor:
    """Part every node of every head along its coordinate of largest variance.

    Args:
        points: `[h, n, components]`.
        order: `[h, n]` int64; node `i` holds the queries of the ranks `first[i] <= r < first[i + 1]`.
        first: `[nodes + 1]`.
        middle: `[nodes]`: the ranks from there on are for the larger coordinates.

    Returns:
        `[h, n]`, the order after the split.
    """
    table, valid = _segments(first[:-1], first[1:])
    members = order.index_select(1, table.flatten()).unflatten(1, table.shape)  # [h, nodes, m]
    stride = _STRIDE if members.shape[-1] >= 32 * _STRIDE else 1
    axis = gather_rows(points, members[..., ::stride]).var(-2, correction=0).argmax(-1)  # [h, nodes]
    place = members * points.shape[-1] + axis[..., None]
    coordinate = points.flatten(1).gather(1, place.flatten(1)).view(members.shape)
    coordinate.masked_fill_(~valid, -torch.inf)
    # Sizes differ by at most one: a node whose upper part is the smaller one leaves out the last of the larger ones.
    upper_size = first[1:] - middle
    largest = coordinate.topk(int(upper_size.max()), sorted=False)
    last = largest.indices.gather(-1, largest.values.argmin(-1, keepdim=True))
    upper = torch.zeros_like(members, dtype=torch.bool).scatter_(-1, largest.indices, True)
    upper.scatter_(-1, last, (upper_size == upper_size.max())[:, None].expand_as(last))
    # In each node, the positions of the lower part and then those of the upper one.
    flat = torch.stack([valid & ~upper, upper], 2).flatten().nonzero().squeeze(-1)
    m = members.shape[-1]
    return members.flatten()[flat // (2 * m) * m + flat % m].view_as(order)
