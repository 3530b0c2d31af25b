"""Fixed patterns: each query attends to the keys around it, to global ones and, in BigBird, to some at random.

Both cost linear time and memory; queries of one block share the keys that they look at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gather import gather_rows
from ..random import BASELINE_STREAM, uniform
from .fused import fused


RANDOM_BLOCKS = 3  # per block of queries, as Transformers' BigBird has it
GLOBAL_BLOCKS = 2  # the first and the last
WINDOW_BLOCKS = 3


def longformer(
    query: Tensor, key: Tensor, value: Tensor, scale: float, size: int, seed: int, layer: int, heads: Tensor
) -> Tensor:
    """Longformer's pattern (Beltagy et al. 2020, arXiv 2004.05150): a window, and the first token (CLS) as global.

    A query attends to the keys at most `d // 2` away and to the first key; the first query attends to all keys. The
    projections that Longformer keeps for global tokens are parameters and not part of the pattern.

    Arguments as said in `hf_skein.sketch.baselines`; `n_q = n_k`.

    Raises:
        ValueError: There are not as many queries as keys.
    """
    n = _length(query, key)
    half = min(size // 2, n)
    step = max(half, 1)  # queries of a block
    start = step * torch.arange(-(-n // step), device=key.device)[:, None]
    row = start + torch.arange(step, device=key.device)
    near = start + torch.arange(-half, step + half, device=key.device)
    allowed = (near[:, None] - row[..., None]).abs() <= half
    allowed &= ((near > 0) & (near < n))[:, None]
    index = F.pad(near.clamp(0, n - 1), (1, 0))  # the first key, then those nearby
    index = index.expand(len(key), *index.shape)
    output = _by_blocks(query, key, value, scale, step, index, F.pad(allowed, (1, 0), value=True)[None])
    return torch.cat([fused(query[:, :1], key, value, scale), output[:, 1:]], 1)


def bigbird(
    query: Tensor, key: Tensor, value: Tensor, scale: float, size: int, seed: int, layer: int, heads: Tensor
) -> Tensor:
    """BigBird's pattern (Zaheer et al. 2020, arXiv 2007.14062), in blocks of `d // 8`.

    A block of queries attends to its own block of keys, those before and after it, the first, the last and 3 at random;
    the first and the last block of queries attend to all keys. So each query attends to `d` keys. A sequence of 8
    blocks or less is exact.

    Arguments as said in `hf_skein.sketch.baselines`; `n_q = n_k`.

    Raises:
        ValueError: There are not as many queries as keys.
    """
    n = _length(query, key)
    seen = GLOBAL_BLOCKS + WINDOW_BLOCKS + RANDOM_BLOCKS
    step = max(size // seen, 1)
    blocks = -(-n // step)
    if blocks <= seen:
        return fused(query, key, value, scale)
    uniforms = uniform(seed, layer, heads, BASELINE_STREAM, blocks * RANDOM_BLOCKS, key.device)
    drawn = random_blocks(uniforms.view(len(key), blocks, RANDOM_BLOCKS))
    window = torch.arange(blocks, device=key.device)[:, None] + torch.arange(-1, 2, device=key.device)
    ends = torch.tensor([0, blocks - 1], device=key.device).expand(blocks, 2)
    fixed = torch.cat([ends, window], 1).expand(len(key), -1, -1)
    chosen = torch.cat([fixed, drawn], -1)  # [h, blocks, seen]
    is_new = (chosen > 0) & (chosen < blocks - 1)
    is_new[..., :GLOBAL_BLOCKS] = True
    index = chosen[..., None] * step + torch.arange(step, device=key.device)
    allowed = (is_new[..., None] & (index < n)).flatten(2)[:, :, None]
    output = _by_blocks(query, key, value, scale, step, index.flatten(2).clamp(0, n - 1), allowed)
    last = (blocks - 1) * step
    first_rows, last_rows = (fused(x, key, value, scale) for x in (query[:, :step], query[:, last:]))
    return torch.cat([first_rows, output[:, step:last], last_rows], 1)


def random_blocks(uniforms: Tensor) -> Tensor:
    """For each block, distinct others that are neither next to it nor the first or last, drawn uniformly.

    Args:
        uniforms: `[h, blocks, count]` in (0, 1).

    Returns:
        `[h, blocks, count]` int64.
    """
    _, blocks, count = uniforms.shape
    block = torch.arange(blocks, device=uniforms.device)
    low, high = (block - 1).clamp_min(1), (block + 1).clamp_max(blocks - 2)  # not to be drawn
    candidates = blocks - 2 - (high - low + 1)
    ranks = uniforms.new_empty(*uniforms.shape[:2], 0, dtype=torch.int64)
    for i in range(count):
        rank = (uniforms[..., i] * (candidates - i)).long().minimum(candidates - i - 1)
        for earlier in ranks.sort(-1).values.unbind(-1):  # the rank counts those not drawn yet
            rank = rank + (rank >= earlier)
        ranks = torch.cat([ranks, rank[..., None]], -1)
    return ranks + 1 + (ranks + 1 >= low[:, None]) * (high - low + 1)[:, None]


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, step: int, index: Tensor, allowed: Tensor
) -> Tensor:
    """`[h, n, pv]`: queries `[h, n, p]` in blocks of `step`, each of which attends to keys of its own.

    Args:
        index: `[h, blocks, m]`, those keys.
        allowed: `[1 or h, blocks, 1 or step, m]` bool, which of them each query sees.
    """
    heads, n, p = query.shape
    blocks = index.shape[1]
    query = F.pad(query, (0, 0, 0, blocks * step - n)).view(heads, blocks, step, p)
    output = F.scaled_dot_product_attention(
        query,
        gather_rows(key, index),
        gather_rows(value, index),
        attn_mask=allowed.expand(-1, -1, step, -1),
        scale=scale,
    )
    return output.flatten(1, 2)[:, :n]


def _length(query: Tensor, key: Tensor) -> int:
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            "A window is one of self-attention, with as many queries as keys; got "
            f"{query.shape[1]} queries and {key.shape[1]} keys."
        )
    return key.shape[1]
