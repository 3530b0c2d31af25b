"""Rows of each head, taken by index."""

from __future__ import annotations

import torch
from torch import Tensor


def evenly_spaced(n: int, count: int, device: torch.device) -> Tensor:
    """`[min(n, count)]` of the positions below `n`, at even spacing, each in the middle of its part."""
    count = min(n, count)
    return (2 * torch.arange(count, device=device) + 1) * n // (2 * count)


def sample_rows(x: Tensor, count: int) -> Tensor:
    """`[h, n, ...]` to `[h, min(n, count), ...]`: rows at even spacing."""
    return x.index_select(1, evenly_spaced(x.shape[1], count, x.device))


def flat_index(index: Tensor, length: int) -> Tensor:
    """Indices within a head, `[h, ...]`, as indices into `h` heads of `length` rows one after another."""
    offset = length * torch.arange(len(index), device=index.device)
    return index + offset.view(-1, *[1] * (index.ndim - 1))


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each head: `[h, n, p]` and `[h, ...]` to `[h, ..., p]`."""
    rows = flat_index(index, x.shape[1])
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)
