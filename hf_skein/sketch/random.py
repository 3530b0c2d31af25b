"""Counter-based random numbers: a value depends on (seed, layer, head, stream, position) and on nothing else.

No global generator is read or advanced, so batch neighbours, padding, the device and recomputation cannot change a
draw.
"""

from __future__ import annotations

import torch
from torch import Tensor


_MASK = 0xFFFFFFFF

PILOT_STREAM = 0
COLUMN_STREAM = 1
BASELINE_STREAM = 2


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finalizer of MurmurHash3, in int64 arithmetic. `x` holds values in [0, 2**32)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def uniform(
    seed: int, layer: int, heads: Tensor, stream: int, count: int, device: torch.device | str | None = None
) -> Tensor:
    """Uniform numbers strictly between 0 and 1.

    Args:
        seed: Seed of the configuration.
        layer: Index of the layer.
        heads: `[h]` int64, indices of the heads.
        stream: What the numbers are for (`PILOT_STREAM`, `COLUMN_STREAM`, `BASELINE_STREAM`).
        count: How many positions, starting from 0.
        device: Where the result lives.

    Returns:
        `[h, count]` float64.
    """
    state = torch.zeros((len(heads), 1), dtype=torch.int64, device=device)
    for word in (seed, layer, heads.to(state.device)[:, None], stream, torch.arange(count, device=state.device)):
        state = _mix((state + word + 0x9E3779B9) & _MASK)
    return (state.to(torch.float64) + 0.5) / 2.0**32


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise of the same shape, by the inverse of its distribution function."""
    return -torch.log(-torch.log(uniforms))


def normal(uniforms: Tensor) -> Tensor:
    """Standard normal numbers of the same shape, by the inverse of their distribution function."""
    return torch.special.ndtri(uniforms)
