"""Pilots: the few query rows whose attention says which columns matter."""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Blocks


# Scores of pilots against keys that are held at a time, by taking some heads after others.
SCORES_PER_STEP = 2**20


def random_rows(uniforms: Tensor, num_queries: int) -> Tensor:
    """Row indices drawn uniformly with replacement (step 1 of Algorithm 1).

    Args:
        uniforms: `[h, pilots]` in (0, 1).
        num_queries: Number of rows to draw from.

    Returns:
        `[h, pilots]` int64.
    """
    return (uniforms * num_queries).long().clamp_max(num_queries - 1)


def block_means(query: Tensor, blocks: Blocks, num_pilots: int) -> Tensor:
    """Mean query of each block, or of `num_pilots` consecutive parts of it.

    Args:
        query: `[h, n, p]`.
        blocks: The blocks of `route`.
        num_pilots: Parts per block; at most the size of the smallest block is used.

    Returns:
        `[h, blocks, pilots, p]`.
    """
    size = blocks.filled.shape[-1]
    pilots = min(num_pilots, int(blocks.filled.sum(-1).min()))
    part = torch.arange(size, device=query.device) * pilots // size
    members = (part == torch.arange(pilots, device=query.device)[:, None]) & blocks.filled[:, None]
    weights = members.to(query.dtype)
    weights = weights / weights.sum(-1, keepdim=True)  # [blocks, pilots, size]
    heads, n_blocks, _ = blocks.index.shape
    gathered = query.gather(1, blocks.index.flatten(1)[..., None].expand(-1, -1, query.shape[-1]))
    return weights @ gathered.view(heads, n_blocks, size, -1)


def log_rms_attention(pilots: Tensor, key: Tensor, scale: float) -> Tensor:
    """Logarithm of the root sum of squares, over the pilots of a group, of their attention probabilities.

    In logarithms, so that an extreme logit neither overflows nor makes all other columns equal.

    Args:
        pilots: `[h, groups, pilots, p]` queries.
        key: `[h, n, p]`.
        scale: Multiplies the logits.

    Returns:
        `[h, groups, n]`. With one pilot it is given up to a constant per group, which no ranking sees.
    """
    logits = ((pilots * scale).flatten(1, 2) @ key.mT).unflatten(1, pilots.shape[1:3])
    if pilots.shape[2] == 1:
        return logits.squeeze(2)
    return torch.logsumexp(2 * torch.log_softmax(logits, -1), 2) / 2
