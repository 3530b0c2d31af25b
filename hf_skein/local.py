"""Exact sliding-window attention with linear memory, for the local layers of ModernBERT and kin."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


QUERIES_PER_STEP = 2048


def band_mask(
    mask_function: Callable,
    batch: int,
    n: int,
    window: int,
    padding: Tensor | None,
    device: torch.device | str | None,
) -> Tensor:
    """The mask of a sliding window, kept as a band.

    Args:
        mask_function: Transformers' rule `(batch, head, query, key) -> bool`; allows `|query - key| <= window` only.
        batch: Batch size.
        n: Length.
        window: Half width `w` of the window.
        padding: `[batch, n]` bool, True for valid keys, or None.
        device: Where the result lives.

    Returns:
        `[batch, n, 2w + 1]` bool: entry `[b, i, j]` says whether query `i` may attend to key `i - w + j`.
    """
    device = padding.device if padding is not None else device
    query = torch.arange(n, device=device)[None, :, None]
    key = query + torch.arange(-window, window + 1, device=device)
    inside = (key >= 0) & (key < n)
    key = key.clamp(0, n - 1)
    rows = torch.arange(batch, device=device)[:, None, None]
    band = inside & mask_function(rows, 0, query, key)
    if padding is not None:
        band = band & padding[rows, key]
    return band.expand(batch, n, -1)


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, band: Tensor, scaling: float | None, dropout: float = 0.0
) -> Tensor:
    """Exact attention within a band.

    Queries are cut into chunks as long as the window; a chunk sees the chunk before, itself and the one after.

    Args:
        query: `[batch, heads, n, p]`.
        key: `[batch, kv_heads, n, p]`.
        value: `[batch, kv_heads, n, pv]`.
        band: `[batch, n, 2w + 1]`, of `band_mask`.
        scaling: Multiplies the logits; default `p**-0.5`.
        dropout: Probability of dropping an attention weight.

    Returns:
        `[batch, heads, n, pv]`; a query that may attend to nothing gets zeros.
    """
    batch, heads, n, _ = query.shape
    window = band.shape[-1] // 2
    chunk = max(window, 1)
    chunks = -(-n // chunk)
    spare = chunks * chunk - n
    group = heads // key.shape[1]

    def by_chunk(x: Tensor) -> Tensor:  # [batch, h, n, p] -> [batch, chunks, h, 3 * chunk, p]
        x = F.pad(x, (0, 0, chunk, chunk + spare)).unfold(2, 3 * chunk, chunk)  # [batch, h, chunks, p, 3 * chunk]
        return x.permute(0, 2, 1, 4, 3).repeat_interleave(group, 2)

    query = F.pad(query, (0, 0, 0, spare)).unflatten(2, (chunks, chunk)).transpose(1, 2)
    key, value = by_chunk(key), by_chunk(value)
    band = F.pad(band, (0, 0, 0, spare)).unflatten(1, (chunks, chunk))
    # Key c of the three chunks lies c - chunk after the first query of the chunk, and band column j at query + j - w.
    column = torch.arange(3 * chunk, device=band.device) - torch.arange(chunk, device=band.device)[:, None]
    column = column - chunk + window  # [chunk, 3 * chunk]
    inside = (column >= 0) & (column <= 2 * window)
    column = column.clamp(0, 2 * window)

    step = max(1, QUERIES_PER_STEP // chunk)
    outputs = []
    for first in range(0, chunks, step):
        piece = slice(first, first + step)
        piece_band = band[:, piece]
        mask = piece_band.gather(3, column.expand(*piece_band.shape[:2], -1, -1)) & inside
        mask = mask.flatten(0, 1)[:, None]
        output = F.scaled_dot_product_attention(
            query[:, piece].flatten(0, 1),
            key[:, piece].flatten(0, 1),
            value[:, piece].flatten(0, 1),
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
        )
        output = output.masked_fill(~mask.any(-1, keepdim=True), 0)
        outputs.append(output.unflatten(0, (batch, -1)))
    output = torch.cat(outputs, 1)  # [batch, chunks, heads, chunk, pv]
    return output.transpose(1, 2).flatten(2, 3)[:, :, :n]
