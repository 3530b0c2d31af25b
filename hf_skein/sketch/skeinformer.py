"""`method="skeinformer"`: Algorithm 1 of "Sketching as a Tool for Understanding and Accelerating Self-attention for
Long Sequences" (Chen, Zeng, Hakkani-Tur, Jin, Ji, Yang; NAACL 2022, arXiv 2112.05359)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import SkeinConfig
from . import strata
from .columns import draw_columns, log_value_norm
from .pilots import SCORES_PER_STEP, log_rms_attention, random_rows
from .random import COLUMN_STREAM, PILOT_STREAM, uniform
from .routing import route
from .rows import Selection


def log_column_probability(pilot_query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Eq. 5, `p_i ∝ (Σ_k B[j_k, i]²)^(1/2) · ‖V_i‖` with `B_J = softmax(s Q_J Kᵀ)`, in logarithms.

    Args:
        pilot_query: `[h, pilots, p]`, the rows `Q_J`.
        key: `[h, n, p]`.
        value: `[h, n, pv]`.
        scale: Multiplies the logits.

    Returns:
        `[h, n]`, up to a constant per head, and `B_J`, `[h, pilots, n]`.
    """
    weights = (scale * pilot_query @ key.mT).softmax(-1)
    total = weights.square().sum(1)
    if bool((total >= torch.finfo(total.dtype).tiny).all()):
        log_rms = total.log_().div_(2)
    else:  # some squares vanish
        log_rms = log_rms_attention(pilot_query[:, None], key, scale)[:, 0]
    return log_rms + log_value_norm(value, center=False), weights


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
    """Steps 1 to 3 of Algorithm 1: pilot rows with replacement, columns without, by eq. 5. One block holds all queries.

    Arguments as in `adaptive.select`.

    Returns:
        The selection; columns are `[h, 1, num_columns + m]`, exact rows the pilots (step 5) unless switched off, and
        the marked tokens. Where no gradient is wanted, the pilots' rows `B_J V` come along.
    """
    n_queries, n_keys = query.shape[-2], key.shape[-2]
    pilots = config.num_pilots or config.num_columns
    rows = random_rows(uniform(config.seed, layer, heads, PILOT_STREAM, pilots, query.device), n_queries)
    uniforms = uniform(config.seed, layer, heads, COLUMN_STREAM, n_keys, key.device)
    is_reused = config.pilot_reutilization and marked is None
    is_reused &= not (query.requires_grad or key.requires_grad or value.requires_grad)
    exact_output = None
    if config.column_sampling == "uniform":
        log_probability = torch.zeros_like(uniforms)
    else:
        pilot_query = query.gather(1, rows[..., None].expand(-1, -1, query.shape[-1]))
        scores = max(1, SCORES_PER_STEP // (pilots * n_keys))  # heads at a time
        parts = zip(pilot_query.split(scores), key.split(scores), value.split(scores), strict=True)
        found = []
        for q, k, v in parts:
            log_probability, weights = log_column_probability(q, k, v, scale)
            found.append((log_probability, weights @ v if is_reused else None))
        log_probability = torch.cat([x for x, _ in found])
        exact_output = torch.cat([x for _, x in found]) if is_reused else None
    if not config.pilot_reutilization:
        rows = rows[:, :0]
    count = config.num_columns
    if marked is not None:
        log_probability[:, marked] = torch.inf
        rows, count = torch.cat([rows, marked.expand(len(rows), -1)], 1), count + len(marked)
    columns = draw_columns(log_probability, count, uniforms)
    stratum = strata.assign(key, config.resolved_strata)
    return Selection(route(query, key, 1), columns[:, None], rows, stratum, exact_output)
