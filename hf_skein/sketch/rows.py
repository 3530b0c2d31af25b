"""Rows: attention of a block of queries to its chosen columns and the residual; and the reference of both methods.

The methods differ only in what they select (`adaptive.select`, `skeinformer.select`); what follows is the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import SkeinConfig
from .residual import RESIDUALS, Rest
from .routing import Blocks


class Selection(NamedTuple):
    """What a method selects for the heads of one sequence. Constants: no gradient flows through a choice.

    Attributes:
        blocks: Queries by block.
        columns: `[h, blocks, d]` int64, keys each block attends to exactly.
        exact_rows: `[h, r]` int64, query rows computed over all keys (repetitions allowed).
        stratum: `[h, n_k]` int64, the stratum of each key; one stratum where the residual knows none.
        exact_output: `[h, r, pv]`, the result of the exact rows where choosing the columns gave it and no gradient
            is wanted; the reference computes it again.
    """

    blocks: Blocks
    columns: Tensor
    exact_rows: Tensor
    stratum: Tensor
    exact_output: Tensor | None = None


def sketched_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stratum: Tensor,
    columns: Tensor,
    scale: float,
    row_normalization: str,
    residual: str,
) -> Tensor:
    """Sketched attention of some queries of one head.

    Args:
        query: `[m, p]`.
        key: `[n, p]`.
        value: `[n, pv]`.
        stratum: `[n]` int64, the stratum of each key.
        columns: `[d]` int64, distinct.
        scale: Multiplies the logits.
        row_normalization: `"adaptive"` (eq. 6), `"simple"` or `"none"`; see `SkeinConfig`.
        residual: A name of `RESIDUALS`; only used by adaptive row normalization.

    Returns:
        `[m, pv]`.
    """
    chosen_key, chosen_value = key[columns], value[columns]
    logits = scale * query @ chosen_key.T
    if row_normalization == "none":
        row_sum = torch.logsumexp(scale * query @ key.T, -1, keepdim=True)
        return (logits - row_sum).exp() @ chosen_value
    if row_normalization == "simple" or len(columns) == len(key):
        return logits.softmax(-1) @ chosen_value
    other = torch.ones(len(key), dtype=torch.bool, device=key.device).index_fill(0, columns, False)
    rest = Rest(key[other], value[other], stratum[other])
    log_mass, rest_value = RESIDUALS[residual](query, chosen_key, rest, scale)
    weights = torch.cat([logits, log_mass[:, None]], -1).softmax(-1)
    return weights[:, :-1] @ chosen_value + weights[:, -1:] * rest_value


def overwrite_rows(output: Tensor, rows: Tensor, replacement: Tensor) -> Tensor:
    """`output` with some rows replaced (in place, without gradients); of repeated rows one replacement is used, in the
    gradient too.

    Args:
        output: `[n, p]`.
        rows: `[r]` int64.
        replacement: `[r, p]`.

    Returns:
        `[n, p]`.
    """
    order = torch.arange(len(rows), device=rows.device)
    chosen = torch.zeros(len(output), dtype=torch.int64, device=output.device).scatter_(0, rows, order)
    replacement = replacement.where((chosen[rows] == order)[:, None], 0)
    if output.requires_grad:
        output = output.clone()
    return output.index_fill_(0, rows, 0).index_add_(0, rows, replacement)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    config: SkeinConfig,
) -> Tensor:
    """The reference: sketched attention of all heads of one sequence, head by head and block by block.

    Args:
        query: `[h, n_q, p]`.
        key: `[h, n_k, p]`.
        value: `[h, n_k, pv]`.
        selection: Of either method.
        scale: Multiplies the logits.
        config: Row normalization and residual are read from it.

    Returns:
        `[h, n_q, pv]`.
    """
    outputs = []
    for head, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
        rows = [
            sketched_rows(
                q[index],
                k,
                v,
                selection.stratum[head],
                columns,
                scale,
                config.row_normalization,
                config.resolved_residual,
            )
            for index, columns in zip(selection.blocks.index[head], selection.columns[head], strict=True)
        ]
        output = torch.cat(rows)[selection.blocks.slot[head]]
        exact = selection.exact_rows[head]
        outputs.append(overwrite_rows(output, exact, (scale * q[exact] @ k.T).softmax(-1) @ v))
    return torch.stack(outputs)
