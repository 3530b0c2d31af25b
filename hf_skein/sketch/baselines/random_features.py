"""Performer: positive random features of the softmax kernel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..random import BASELINE_STREAM, normal, uniform


def performer(
    query: Tensor, key: Tensor, value: Tensor, scale: float, size: int, seed: int, layer: int, heads: Tensor
) -> Tensor:
    """Performer's FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794) with `d` positive orthogonal random features.

    `exp(s q·k) = E φ(√s q)·φ(√s k)` with `φ_i(x) = exp(ω_i·x - ‖x‖²/2) / √d` and `ω_i ~ N(0, I)`; so attention is
    `φ(Q) (φ(K)ᵀV)`, over its row sums. With `c_i = log Σ_j φ_i(k_j)` it is a softmax over features of `ω_i·q + c_i`,
    times a softmax over keys of `ω_i·k_j - ‖k_j‖²/2`, which is how it is computed: nothing can overflow or vanish.

    Arguments as said in `hf_skein.sketch.baselines`.
    """
    features = orthogonal_features(size, query.shape[-1], seed, layer, query.device).to(query.dtype)
    query, key = query * scale**0.5, key * scale**0.5
    log_features = key @ features.mT - key.square().sum(-1, keepdim=True) / 2
    means = log_features.softmax(1).mT @ value  # [h, d, pv]
    return (query @ features.mT + log_features.logsumexp(1, keepdim=True)).softmax(-1) @ means


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def orthogonal_features(size: int, p: int, seed: int, layer: int, device: torch.device) -> Tensor:
    """`ω [d, p]` float64, shared by the heads of a layer: each row is normal, each `p` of them are orthogonal.

    The directions are those of a random rotation, the lengths are drawn apart from them.
    """
    blocks = -(-size // p)
    shared = torch.zeros(1, dtype=torch.int64)
    numbers = normal(uniform(seed, layer, shared, BASELINE_STREAM, 2 * blocks * p * p, device))
    directions, lengths = numbers.view(2, blocks, p, p)
    q, r = torch.linalg.qr(directions)
    rotation = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # without the signs it would not be uniform
    return (rotation * lengths.norm(dim=-1, keepdim=True)).flatten(0, 1)[:size]
