"""Nyströmformer: attention through landmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..strata import sums
from .fused import fused


def nystromformer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    size: int,
    seed: int,
    layer: int,
    heads: Tensor,
    iterations: int = 6,
) -> Tensor:
    """Nyströmformer (Xiong et al. 2021, arXiv 2102.03902), without its convolution, which has parameters.

    `softmax(s Q K̃ᵀ) · pinv(softmax(s Q̃ K̃ᵀ)) · softmax(s Q̃ Kᵀ) V`, the landmarks `Q̃` and `K̃` being the means of `d`
    segments of consecutive queries and keys, which differ in length by one at most.

    Arguments as said in `hf_skein.sketch.baselines`; `iterations` of the inverse.
    """
    size = min(size, query.shape[1], key.shape[1])
    query_landmarks, key_landmarks = segment_means(query, size), segment_means(key, size)
    middle = (scale * query_landmarks @ key_landmarks.mT).softmax(-1)
    summary = fused(query_landmarks, key, value, scale)
    return fused(query, key_landmarks, pseudo_inverse(middle, iterations) @ summary, scale)


def segment_means(x: Tensor, count: int) -> Tensor:
    """`[h, n, p]` to the means `[h, count, p]` of consecutive segments; `count` is at most `n`."""
    heads, n, _ = x.shape
    segment = torch.arange(n, device=x.device) * count // n
    total, size = sums(segment.expand(heads, n), count, x)
    return total / size


def pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """The Moore-Penrose inverse of `A [h, d, d]` by a third-order iteration (Razavi et al. 2014).

    `Z ← Z (13 I - AZ (15 I - AZ (7 I - AZ))) / 4`, from `Aᵀ / (‖A‖₁ ‖A‖∞)` of every head; rows of `A` sum to one.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    z = matrix.mT / matrix.sum(-2).amax(-1)[:, None, None]
    for _ in range(iterations):
        az = matrix @ z
        z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
    return z
