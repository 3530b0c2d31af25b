"""What a method selects, composed of routing, pilots, columns and strata. No gradient flows through a choice."""

from __future__ import annotations

import math

from torch import Tensor

from . import exact_rows as exact
from . import strata
from .columns import block_columns, draw_scores, shared_columns
from .covariance import covariance
from .layout import Layout, Selection, mark_exact
from .pilots import block_means, log_sum_exp, random_rows
from .random import random_key
from .routing import route


SAMPLE = 1024  # queries that the spread about the pilots is taken from


def adaptive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float,
    blocks: int,
    room: int,
    num_columns: int,
    num_strata: int,
    num_pilots: int = 1,
    exact_rows: int = 0,
    uniform: bool = False,
    seed: int = 0,
    layer: int = 0,
) -> tuple[Tensor, Tensor, Selection]:
    """Routed blocks, each with the columns that its pilots and the values make matter; `sketch.adaptive.select`.

    Args:
        query: `[B, H, n_q, p]`, last stride 1.
        key: `[B, HK, n_k, p]`, last stride 1.
        value: `[B, HK, n_k, pv]`, last stride 1.
        layout: Where the valid tokens are, and how many blocks they make.
        scale: Multiplies the logits.
        blocks: Most blocks of a sequence of the padded length, a power of two.
        room: Blocks that the columns have room for.
        num_columns: Columns per block, fewer than the valid keys of every sequence that is sketched.
        num_strata: Strata per key head.
        num_pilots: Parts of each block whose means are its pilots.
        exact_rows: The first valid queries, which are exact rows; the first valid keys are columns of every block.
        uniform: Draw the columns instead, the same for all blocks.
        seed: Of the random numbers, from 0 to 2**32 - 1.
        layer: Likewise.

    Returns:
        The means of keys `[B, HK, p]` and of values `[B, HK, pv]`, float32; and the selection.
    """
    key_mean, value_mean, *exact_results = exact.rows_and_means(query, key, value, exact_rows, layout, scale)
    order = route(query, key, blocks, layout)
    if uniform:
        score = draw_scores(None, query, key, value, scale, random_key(seed, layer), exact_rows, layout)
        columns = shared_columns(score, num_columns, layout).expand(-1, -1, room, -1).contiguous()
        stratum = strata.assign(key, key_mean, num_strata, layout)
    else:
        pilots = block_means(query, order, blocks, num_pilots, layout)
        spread = covariance(
            query, order, layout.query_length, layout.blocks, sample=SAMPLE, pilots=pilots, factor=scale**2 / 2
        )
        means = strata.means(key, key_mean, num_strata, layout)
        columns, stratum = block_columns(
            pilots, key, value, key_mean, value_mean, spread, means, num_columns, scale, exact_rows, room, layout
        )
    order, rows = mark_exact(order, exact_rows, layout)
    return key_mean, value_mean, Selection(order, columns, rows, stratum, *exact_results)


def skeinformer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float,
    num_columns: int,
    num_strata: int,
    num_pilots: int,
    pilot_reutilization: bool = True,
    uniform: bool = False,
    seed: int = 0,
    layer: int = 0,
) -> tuple[Tensor, Tensor, Selection]:
    """Steps 1 to 3 of Algorithm 1 of the paper, with the random numbers of `sketch.skeinformer.select`; one block.

    Args:
        num_pilots: Random rows, drawn with replacement.
        pilot_reutilization: Whether these are exact rows.
        uniform: Draw all columns with the same probability.

    The others, and the result, are those of `adaptive`.
    """
    numbers = random_key(seed, layer)
    positions, distinct = random_rows(query, num_pilots, numbers, layout)
    rows = positions if pilot_reutilization else 0
    key_mean, value_mean, exact_output, exact_lse = exact.rows_and_means(query, key, value, rows, layout, scale)
    if uniform:
        looked_at = None
    elif pilot_reutilization:
        looked_at = positions, exact_lse
    else:
        pilots = query.gather(2, positions.long()[..., None].expand(-1, -1, -1, query.shape[-1]))
        looked_at = positions, log_sum_exp(pilots, key, None, scale, layout) / math.log(2)
    score = draw_scores(looked_at, query, key, value, scale, numbers, 0, layout)
    columns = shared_columns(score, num_columns, layout)
    order, rows = mark_exact(route(query, key, 1, layout), distinct if pilot_reutilization else 0, layout)
    stratum = strata.assign(key, key_mean, num_strata, layout)
    return key_mean, value_mean, Selection(order, columns, rows, stratum, exact_output, exact_lse)
