"""Columns: which keys are attended to exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from .random import gumbel


def log_value_norm(value: Tensor, center: bool) -> Tensor:
    """Logarithm of the Euclidean norm of each value row.

    Args:
        value: `[..., n, p]`.
        center: Subtract the mean value first: what all rows share needs no column.

    Returns:
        `[..., n]`; a zero row gives `-inf`.
    """
    if center:
        mean = value.mean(-2, keepdim=True)
        return torch.cdist(value, mean, compute_mode="donot_use_mm_for_euclid_dist").squeeze(-1).log_()
    return value.norm(dim=-1).log_()


def top_columns(score: Tensor, count: int) -> Tensor:
    """The `count` columns of the highest score.

    Args:
        score: `[..., n]`.
        count: Columns to take, at most `n`.

    Returns:
        `[..., count]` int64, in no particular order.
    """
    return score.topk(count, dim=-1, sorted=False).indices


def draw_columns(log_probability: Tensor, count: int, uniforms: Tensor) -> Tensor:
    """Draw columns without replacement, with the given probabilities: the top of Gumbel-perturbed logarithms.

    Args:
        log_probability: `[h, n]`, up to a constant per head; `-inf` is drawn only when nothing else is left.
        count: Columns to draw.
        uniforms: `[h, n]` in (0, 1).

    Returns:
        `[h, count]` int64.
    """
    return top_columns(log_probability + gumbel(uniforms), count)
