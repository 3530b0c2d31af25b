"""`method="adaptive"`, the default: routed blocks of queries, each with its own columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import SkeinConfig
from . import strata
from .columns import draw_columns, log_value_norm, top_columns
from .pilots import SCORES_PER_STEP, block_pilots, log_mean_exponential, log_rms_attention
from .random import COLUMN_STREAM, uniform
from .routing import num_blocks, route
from .rows import Selection


@torch.no_grad()
def select(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    config: SkeinConfig,
    layer: int,
    heads: Tensor,
    marked: Tensor | None = None,
) -> Selection:
    """Blocks by routing; columns by the block's pilots and the distance of each value from the mean value.

    The score of column `j` in block `g` is `π_g[j] · ‖v_j - mean(V)‖`, with `π_g[j] ∝ exp(s q̄_g·k_j + s²/2 k_jᵀΣk_j)`
    the mean attention of queries that spread about the block's mean `q̄_g` with covariance `Σ` (or its root mean square
    over several parts of the block). The first `exact_rows` tokens and the marked ones are exact rows and columns of
    every block.

    Args:
        query: `[h, n_q, p]`.
        key: `[h, n_k, p]`, `n_k > num_columns`.
        value: `[h, n_k, pv]`.
        scale: Multiplies the logits.
        config: The settings.
        layer: Index of the layer (only for uniform columns, which are drawn).
        heads: `[h]` indices of the heads (likewise).
        marked: `[m]` int64, tokens that attend exactly and are columns on top of `num_columns`; fewer than
            `n_k - num_columns`.

    Returns:
        The selection; columns are `[h, blocks, num_columns + m]`.
    """
    n_heads, n_queries, _ = query.shape
    first = torch.arange(config.exact_rows, device=query.device)
    marked = first[:0] if marked is None else marked
    always, exact_rows = torch.cat([first, marked]), torch.cat([first[:n_queries], marked])
    count = config.num_columns + len(marked)
    blocks = route(query, key, num_blocks(n_queries, config.block_size, config.max_blocks))
    if config.column_sampling == "uniform":
        uniforms = uniform(config.seed, layer, heads, COLUMN_STREAM, key.shape[-2], key.device)
        log_probability = torch.zeros_like(uniforms)
        log_probability[:, always] = torch.inf
        columns = draw_columns(log_probability, count, uniforms)
        columns = columns[:, None].expand(-1, len(blocks.filled), -1)
    else:
        pilots = block_pilots(query, blocks, config.num_pilots or 1)
        spread = log_mean_exponential(key, pilots.covariance, scale)
        value_norm = log_value_norm(value, center=True)
        value_norm[:, always] = torch.inf
        scores = max(1, SCORES_PER_STEP // (pilots.mean[0, ..., 0].numel() * key.shape[1]))  # heads at a time
        parts = zip(*(x.split(scores) for x in (pilots.mean, key, spread, value_norm)), strict=True)
        columns = torch.cat(
            [top_columns(log_rms_attention(p, k, scale, bias).add_(norm[:, None]), count) for p, k, bias, norm in parts]
        )
    return Selection(blocks, columns, exact_rows.expand(n_heads, -1), strata.assign(key, config.resolved_strata))
