"""Random projections of the sequence: Linformer, and the sketch that it departs from."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..random import BASELINE_STREAM, normal, uniform
from .fused import fused


def linformer(
    query: Tensor, key: Tensor, value: Tensor, scale: float, size: int, seed: int, layer: int, heads: Tensor
) -> Tensor:
    """Linformer (Wang et al. 2020, arXiv 2006.04768): `softmax(s Q (SᵀK)ᵀ) SᵀV`, with `S [n, d]`.

    Keys and values share `S`, and so do all heads and layers (the paper's layerwise sharing); its entries are those
    with which the paper's analysis begins, independent `N(0, 1/d)`. Linformer goes on to train them; here they stay.

    Arguments as said in `hf_skein.sketch.baselines`.
    """
    sketch = projection(key, size, seed)
    return fused(query, sketch.mT @ key, sketch.mT @ value, scale)


def unreduced_jl(
    query: Tensor, key: Tensor, value: Tensor, scale: float, size: int, seed: int, layer: int, heads: Tensor
) -> Tensor:
    """The Johnson-Lindenstrauss sketch that Linformer departs from: `softmax(s Q Kᵀ) S SᵀV`.

    It needs the whole attention matrix, which costs n² time; a comparison, no method.
    """
    sketch = projection(key, size, seed)
    return fused(query, key, sketch @ (sketch.mT @ value), scale)


def projection(like: Tensor, size: int, seed: int) -> Tensor:
    """`S [n, d]` for `like` `[h, n, p]`; its row `i` is the same whatever `n`."""
    n = like.shape[1]
    # Kept, as a parameter would be: making the numbers takes longer than using them.
    return _gaussian(1 << (n - 1).bit_length(), size, seed, like.device, like.dtype)[:n]


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _gaussian(rows: int, columns: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    shared = torch.zeros(1, dtype=torch.int64)
    numbers = normal(uniform(seed, 0, shared, BASELINE_STREAM, rows * columns, device))
    return numbers.view(rows, columns).to(dtype) / columns**0.5
