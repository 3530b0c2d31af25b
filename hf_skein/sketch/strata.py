"""Strata: groups of similar keys. Within one, a key that is not a column may stand for its mean."""

from __future__ import annotations

import torch
from torch import Tensor

from .gather import flat_index, sample_rows


SAMPLE_PER_STRATUM = 8  # keys that the k-means iterations look at, per stratum
ITERATIONS = 2


@torch.no_grad()
def assign(key: Tensor, count: int) -> Tensor:
    """Cluster the keys of every head: Lloyd's k-means on a sample at even spacing, then every key to its nearest mean.

    It starts from keys at even spacing; no randomness. A stratum may stay empty.

    Args:
        key: `[h, n, p]`.
        count: Number of strata.

    Returns:
        `[h, n]` int64, the stratum of each key, below `count`.
    """
    heads, n, _ = key.shape
    if count == 1:
        return torch.zeros(heads, n, dtype=torch.int64, device=key.device)
    sample = sample_rows(key, SAMPLE_PER_STRATUM * count)
    means = sample_rows(key, count)
    for _ in range(ITERATIONS):
        total, size = sums(nearest(sample, means), means.shape[1], sample)
        means = torch.where(size > 0, total / size.clamp_min(1), means)
    return nearest(key, means)


def nearest(key: Tensor, means: Tensor) -> Tensor:
    """`[h, n]` int64, for each key `[h, n, p]` the mean `[h, c, p]` that is nearest to it."""
    offset = means.square().sum(-1) / -2
    return torch.baddbmm(offset[:, None], key, means.mT).max(-1).indices  # twice as fast as argmax


def sums(stratum: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over each stratum, and its size.

    Args:
        stratum: `[h, n]` int64.
        count: Number of strata.
        *tensors: `[h, n, ...]`.

    Returns:
        `[h, count, ...]` of every tensor, then the size `[h, count, 1]` in the dtype of the first.
    """
    heads, rows = len(stratum), flat_index(stratum, count).flatten()
    ones = tensors[0].new_ones(*stratum.shape, 1)
    return tuple(
        x.new_zeros(heads * count, x.shape[-1]).index_add(0, rows, x.flatten(0, 1)).view(heads, count, -1)
        for x in (*tensors, ones)
    )
