"""The PyTorch path: what `sketch.rows.attend` computes, in pieces that fit the cache, with linear memory.

The second-order residual is in `second_order.py`. The others rest on one identity: `exp(s q·mean(K))` is the geometric
mean of `exp(s q·k)`, so the geometric and the mean residual are one more, *virtual* key `mean(K)` with value
`mean(V_rest)` and logit bias `log(n - d)`: gather, append, call the fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import second_order
from .config import SkeinConfig
from .sketch.gather import flat_index, gather_rows
from .sketch.rows import Selection, overwrite_rows


LOGITS_PER_STEP = 2**20  # worked on at a time, by the paths that call the fused attention

# From queries `[h, g, m, p]` to outputs `[h, g, m, pv]`, given columns `[h, g, d]`.
Rows = Callable[[Tensor, Tensor], Tensor]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    config: SkeinConfig,
    dropout: float = 0.0,
) -> Tensor:
    """Sketched attention of all heads of one sequence. Arguments as in `sketch.rows.attend`; keys have mean zero.

    Args:
        dropout: Probability with which a column's weight is dropped, from the global generator as in every dropout.

    Returns:
        `[h, n_q, pv]`.
    """
    kind = config.resolved_residual if config.row_normalization == "adaptive" else config.row_normalization
    if kind == "second_order":
        output = second_order.attend(query, key, value, selection, config.resolved_strata, scale, dropout)
    else:
        output = _by_blocks(_ROWS[kind](key, value, scale, dropout), query, selection)
    exact_rows = selection.exact_rows
    if exact_rows.shape[1] == 0:
        return output
    exact = selection.exact_output
    if exact is None or dropout:
        exact = _fused(gather_rows(query, exact_rows), key, value, scale, dropout)
    replaced = flat_index(exact_rows, query.shape[1]).flatten()
    return overwrite_rows(output.flatten(0, 1), replaced, exact.flatten(0, 1)).view_as(output)


def _by_blocks(rows: Rows, query: Tensor, selection: Selection) -> Tensor:
    """`[h, n_q, pv]`, some blocks at a time."""
    (index, _, slot), columns = selection.blocks, selection.columns
    heads, blocks, size = index.shape
    if blocks == 1:  # columns serve all of a head's queries, in their own order
        return rows(query[:, None], columns)[:, 0]
    step = max(1, LOGITS_PER_STEP // (heads * size * columns.shape[-1]))
    pieces = zip(index.split(step, 1), columns.split(step, 1), strict=True)
    output = torch.cat([rows(gather_rows(query, i), c) for i, c in pieces], 1)
    return gather_rows(output.flatten(1, 2), slot)


def _virtual_key(geometric: bool):
    def prepare(key: Tensor, value: Tensor, scale: float, dropout: float) -> Rows:
        key_sum, value_sum = None if geometric else key.sum(1)[:, None], value.sum(1)[:, None]

        def rows(query: Tensor, columns: Tensor) -> Tensor:
            chosen_key, chosen_value = gather_rows(key, columns), gather_rows(value, columns)
            rest = key.shape[1] - columns.shape[-1]
            rest_key = chosen_key.mean(-2) if geometric else (key_sum - chosen_key.sum(-2)) / rest
            rest_value = (value_sum - chosen_value.sum(-2)) / rest
            bias = query.new_zeros(columns.shape[-1] + 1)
            bias[-1] = math.log(rest)
            return _fused(
                query,
                torch.cat([chosen_key, rest_key[..., None, :]], -2),
                torch.cat([chosen_value, rest_value[..., None, :]], -2),
                scale,
                dropout,
                bias.expand(query.shape[-2], -1),
            )

        return rows

    return prepare


def _simple(key: Tensor, value: Tensor, scale: float, dropout: float) -> Rows:
    def rows(query: Tensor, columns: Tensor) -> Tensor:
        return _fused(query, gather_rows(key, columns), gather_rows(value, columns), scale, dropout)

    return rows


def _fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, bias: Tensor | None = None
) -> Tensor:
    """PyTorch's fused attention over `[..., n, p]`, whatever the leading dimensions."""
    flat = (x.flatten(0, -3)[None] for x in (query, key, value))
    output = F.scaled_dot_product_attention(*flat, attn_mask=bias, dropout_p=dropout, scale=scale)
    return output.view(*query.shape[:-1], -1)


def _unnormalized(key: Tensor, value: Tensor, scale: float, dropout: float) -> Rows:
    def some_rows(query: Tensor, columns: Tensor) -> Tensor:
        row_sum = torch.logsumexp(scale * query @ key[:, None].mT, -1, keepdim=True)
        weights = (scale * query @ gather_rows(key, columns).mT - row_sum).exp()
        return F.dropout(weights, dropout) @ gather_rows(value, columns)

    def rows(query: Tensor, columns: Tensor) -> Tensor:
        # The true row sums cost n² time; pieces of rows, computed again in the backward pass, keep the memory linear.
        pieces = query.split(max(1, LOGITS_PER_STEP // (query[..., 0, 0].numel() * key.shape[1])), 2)
        return torch.cat([checkpoint(some_rows, piece, columns, use_reentrant=False) for piece in pieces], 2)

    return rows


_ROWS = {
    "mean": _virtual_key(geometric=False),
    "geometric": _virtual_key(geometric=True),
    "simple": _simple,
    "none": _unnormalized,
}
