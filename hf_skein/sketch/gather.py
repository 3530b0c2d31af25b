"""Rows of each head, taken by index."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_rows(x: Tensor, count: int) -> Tensor:
    """At most `count` rows of each head `[h, n, ...]`, at even spacing; a view."""
    step = -(-x.shape[1] // count)
    return x[:, step // 2 :: step]


def flat_index(index: Tensor, length: int) -> Tensor:
    """Indices within a head, `[h, ...]`, as indices into `h` heads of `length` rows one after another."""
    offset = length * torch.arange(len(index), device=index.device)
    return index + offset.view(-1, *[1] * (index.ndim - 1))


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each head: `[h, n, p]` and `[h, ...]` to `[h, ..., p]`."""
    rows = flat_index(index, x.shape[1])
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)
