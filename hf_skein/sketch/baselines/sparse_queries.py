"""Informer: a few rows exactly, the mean of the values for all others."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gather import gather_rows
from ..pilots import random_rows
from ..random import BASELINE_STREAM, uniform
from .fused import fused
from .vmean import v_mean


def informer(
    query: Tensor, key: Tensor, value: Tensor, scale: float, size: int, seed: int, layer: int, heads: Tensor
) -> Tensor:
    """Informer's ProbSparse attention (Zhou et al. 2021, arXiv 2012.07436, Algorithm 1).

    Of each query the sparsity `M(q) = max_j s q·k_j - mean_j s q·k_j` is measured on `d` keys, drawn uniformly; the `d`
    queries of the highest `M` attend exactly, the others get `mean(V)`.

    Arguments as said in `hf_skein.sketch.baselines`.
    """
    with torch.no_grad():
        drawn = random_rows(uniform(seed, layer, heads, BASELINE_STREAM, size, key.device), key.shape[1])
        logits = scale * query @ gather_rows(key, drawn).mT
        sparsity = logits.amax(-1) - logits.mean(-1)
        rows = sparsity.topk(min(size, query.shape[1]), sorted=False).indices
    exact = fused(gather_rows(query, rows), key, value, scale)
    return v_mean(query, value).scatter(1, rows[..., None].expand_as(exact), exact)
