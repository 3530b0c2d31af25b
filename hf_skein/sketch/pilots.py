"""Pilots: the few query rows whose attention says which columns matter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gather import gather_rows, sample_rows
from .routing import Blocks


# Scores of pilots against keys that are held at a time, by taking some heads after others.
SCORES_PER_STEP = 2**21

_SAMPLE = 1024  # queries, at even spacing, that the covariance is taken from


def random_rows(uniforms: Tensor, num_queries: int) -> Tensor:
    """Row indices drawn uniformly with replacement (step 1 of Algorithm 1).

    Args:
        uniforms: `[h, pilots]` in (0, 1).
        num_queries: Number of rows to draw from.

    Returns:
        `[h, pilots]` int64.
    """
    return (uniforms * num_queries).long().clamp_max(num_queries - 1)


class Pilots(NamedTuple):
    """What stands for the queries of a block when its columns are chosen.

    Attributes:
        mean: `[h, blocks, pilots, p]`, the mean queries of consecutive parts of each block.
        covariance: `[h, p, p]`, of the queries about the mean of their part; all blocks of a head share it.
    """

    mean: Tensor
    covariance: Tensor


def block_pilots(query: Tensor, blocks: Blocks, num_pilots: int) -> Pilots:
    """Mean query of each block, or of `num_pilots` consecutive parts of it, and how queries spread about it.

    Args:
        query: `[h, n, p]`.
        blocks: The blocks of `route`.
        num_pilots: Parts per block; at most the size of the smallest block is used.
    """
    size = blocks.filled.shape[-1]
    lengths = blocks.filled.sum(-1, keepdim=True)
    pilots = min(num_pilots, int(lengths.min()))
    part = torch.arange(size, device=query.device) * pilots // lengths  # [blocks, size], that of a spare slot is none
    members = (part[:, None] == torch.arange(pilots, device=query.device)[:, None]).to(query.dtype)
    count = members.sum(-1, keepdim=True)  # [blocks, pilots, 1]
    mean = (members / count) @ gather_rows(query, blocks.index)
    slot = sample_rows(blocks.slot, _SAMPLE)
    own = gather_rows(mean.flatten(1, 2), slot // size * pilots + part.flatten()[slot])
    # A query that is not finite spoils its own block only.
    spread = (sample_rows(query, _SAMPLE) - own).nan_to_num(0, 0, 0)
    return Pilots(mean, spread.mT @ spread / slot.shape[1])


def log_mean_exponential(key: Tensor, covariance: Tensor, scale: float) -> Tensor:
    """`s²/2 kᵀΣk`: by how much `log E exp(s q·k)` exceeds `s E[q]·k`, for queries of covariance `Σ` (if Gaussian).

    Args:
        key: `[h, n, p]`.
        covariance: `[h, p, p]`.
        scale: Multiplies the logits.

    Returns:
        `[h, n]`.
    """
    return (key @ (scale**2 / 2 * covariance)).mul_(key).sum(-1)


def log_rms_attention(pilots: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Logarithm of the root sum of squares, over the pilots of a group, of their attention probabilities.

    Where squared probabilities vanish it is computed in logarithms, so that an extreme logit does not make all other
    columns equal.

    Args:
        pilots: `[h, groups, pilots, p]` queries.
        key: `[h, n, p]`.
        scale: Multiplies the logits.
        bias: `[h, n]`, added to the logits.

    Returns:
        `[h, groups, n]`. With one pilot it is given up to a constant per group, which no ranking sees.
    """
    rows = (pilots * scale).flatten(1, 2)
    logits = rows @ key.mT if bias is None else torch.baddbmm(bias[:, None], rows, key.mT)
    logits = logits.unflatten(1, pilots.shape[1:3])
    if pilots.shape[2] == 1:
        return logits.squeeze(2)
    total = logits.softmax(-1).square_().sum(2)
    if bool((total >= torch.finfo(total.dtype).tiny).all()):
        return total.log_().div_(2)
    return torch.logsumexp(2 * logits.log_softmax(-1), 2) / 2
