"""The PyTorch path: what `sketch.rows.attend` computes, in pieces that fit the cache, with linear memory.

Two identities spare most of the reference's work.

*Virtual key.* `exp(s q·mean(K))` is the geometric mean of `exp(s q·k)`, so the geometric and the mean residual are one
more key `mean(K)` with value `mean(V_rest)` and logit bias `log(n - d)`: gather, append, call the fused attention.

*Second-order residual from the logits.* Over keys and values centred on their means, the sums over the columns not
chosen are minus those over the chosen; with `l_j = s q·k_j` of the chosen, `r = n - d`, `M = Σ k kᵀ`, `C = Σ k vᵀ`:

    a = -Σ l_j / r,    z = 1 + ½ [(s² qᵀMq - Σ l_j²) / r - a²],    u = exp(a)
    output · (Σ exp(l_j) + r u z) = Σ (exp(l_j) - u (z - a + l_j)) v_j + u s Cᵀq

No statistic per block is formed: two products with `[p, p]` matrices per head, and one pass over logits that are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .config import SkeinConfig
from .sketch.rows import Selection, overwrite_rows


LOGITS_PER_STEP = 2**18  # worked on at a time: with their temporaries a few MB, which the cache holds
LOGITS_PER_GROUP = 2**22  # of the heads that the backward pass computes again at a time

# From queries `[items, m]` and columns `[items, d]`, as rows of the flattened heads, to outputs `[items, m, pv]`.
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

    Only inputs and the selection are kept for the backward pass, which computes a group of heads at a time again.

    Args:
        dropout: Probability with which a column's weight is dropped, from the global generator as in every dropout.
            With the second-order residual a dropped column counts as zero relative to the mean value.

    Returns:
        `[h, n_q, pv]`.
    """
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    group = max(1, LOGITS_PER_GROUP // (query.shape[1] * selection.columns.shape[-1]))
    tensors = (
        query,
        key,
        value,
        selection.blocks.index,
        selection.blocks.slot,
        selection.columns,
        selection.exact_rows,
    )
    outputs = []
    for heads in zip(*(x.split(group) for x in tensors), strict=True):
        arguments = (*heads, scale, config, dropout)
        if needs_grad:
            outputs.append(checkpoint(_attend_heads, *arguments, use_reentrant=False, preserve_rng_state=dropout > 0))
        else:
            outputs.append(_attend_heads(*arguments))
    return torch.cat(outputs)


def _attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    slot: Tensor,
    columns: Tensor,
    exact_rows: Tensor,
    scale: float,
    config: SkeinConfig,
    dropout: float,
) -> Tensor:
    """Some heads: `[h, n_q, p]`, `[h, n_k, p]`, `[h, n_k, pv]` and their selection to `[h, n_q, pv]`."""
    heads, blocks, size = index.shape
    count = columns.shape[-1]
    kind = config.resolved_residual if config.row_normalization == "adaptive" else config.row_normalization
    rows, shift = _ROWS[kind](query, key, value, scale, dropout)
    items = _flat(index, query.shape[1]).flatten(0, 1)  # [h * blocks, size]
    chosen = _flat(columns, key.shape[1]).flatten(0, 1)  # [h * blocks, d]
    if blocks == 1:  # columns serve every piece of a head's queries
        pieces = items.split(max(1, LOGITS_PER_STEP // (heads * count)), 1)
        output = torch.cat([rows(piece, chosen) for piece in pieces], 1)
    else:
        step = max(1, LOGITS_PER_STEP // (size * count))
        pieces = zip(items.split(step), chosen.split(step), strict=True)
        output = torch.cat([rows(*piece) for piece in pieces])
    output = _gather(output.flatten(0, 1), _flat(slot, blocks * size)) + shift
    if exact_rows.shape[1] == 0:
        return output
    replaced = _flat(exact_rows, query.shape[1])
    exact_query = _gather(query.flatten(0, 1), replaced)
    exact = F.scaled_dot_product_attention(
        exact_query[None], key[None], value[None], dropout_p=dropout, scale=scale
    ).squeeze(0)
    return overwrite_rows(output.flatten(0, 1), replaced.flatten(), exact.flatten(0, 1)).view_as(output)


def _flat(index: Tensor, length: int) -> Tensor:
    """Indices within a head, `[h, ...]`, as indices into `h` heads of `length` rows one after another."""
    offset = length * torch.arange(len(index), device=index.device)
    return index + offset.view(-1, *[1] * (index.ndim - 1))


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`, by whole rows: `[n, p]` and `[...]` to `[..., p]`."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, -1)


def _second_order(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> tuple[Rows, Tensor]:
    n = key.shape[1]
    value_mean = value.mean(1, keepdim=True)
    value = value - value_mean
    square = ((query @ (scale**2 * (key.mT @ key))) * query).sum(-1, keepdim=True)  # s² qᵀMq
    linear = query @ (scale * (key.mT @ value))  # s Cᵀq
    query, key, value, square, linear = (x.flatten(0, 1) for x in (query * scale, key, value, square, linear))

    def rows(index: Tensor, columns: Tensor) -> Tensor:
        q, chosen_key, chosen_value = _gather(query, index), _gather(key, columns), _gather(value, columns)
        rest = n - columns.shape[-1]
        logits = q @ chosen_key.mT  # [items, m, d]
        a = q @ chosen_key.sum(-2)[..., None] / -rest
        second = _gather(square, index) - torch.linalg.vector_norm(logits, dim=-1, keepdim=True).square()
        z = 1 + (second / rest - a.square()).clamp_min(0) / 2
        top = torch.maximum(logits.detach().amax(-1, keepdim=True), (a + (rest * z).log()).detach())
        exponentials, u = (logits - top).exp_(), (a - top).exp()
        mass = exponentials.sum(-1, keepdim=True) + rest * u * z
        weights = torch.addcmul(exponentials, logits, u, value=-1).sub_(u * (z - a))
        if dropout:
            weights = F.dropout(weights, dropout)
        return (weights @ chosen_value + u * _gather(linear, index)) / mass

    return rows, value_mean


def _virtual_key(geometric: bool):
    def prepare(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> tuple[Rows, float]:
        n, key_sum, value_sum = key.shape[1], key.sum(1), value.sum(1)
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))

        def rows(index: Tensor, columns: Tensor) -> Tensor:
            chosen_key, chosen_value = _gather(key, columns), _gather(value, columns)
            rest = n - columns.shape[-1]
            head = columns[:, 0] // n
            rest_key = chosen_key.mean(-2) if geometric else (key_sum[head] - chosen_key.sum(-2)) / rest
            rest_value = (value_sum[head] - chosen_value.sum(-2)) / rest
            bias = query.new_zeros(columns.shape[-1] + 1)
            bias[-1] = math.log(rest)
            return _fused(
                _gather(query, index),
                torch.cat([chosen_key, rest_key[:, None]], -2),
                torch.cat([chosen_value, rest_value[:, None]], -2),
                scale,
                dropout,
                bias.expand(index.shape[-1], -1),
            )

        return rows, 0.0

    return prepare


def _simple(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> tuple[Rows, float]:
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))

    def rows(index: Tensor, columns: Tensor) -> Tensor:
        return _fused(_gather(query, index), _gather(key, columns), _gather(value, columns), scale, dropout)

    return rows, 0.0


def _fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, bias: Tensor | None = None
) -> Tensor:
    """PyTorch's fused attention over `[items, n, p]`."""
    query, key, value = (x[:, None] for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)[:, 0]


def _unnormalized(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> tuple[Rows, float]:
    # The true row sums cost n² time; pieces of rows keep the memory linear.
    query = query * scale
    pieces = query.split(max(1, LOGITS_PER_STEP // (len(key) * key.shape[1])), 1)
    row_sum = torch.cat([torch.logsumexp(piece @ key.mT, -1, keepdim=True) for piece in pieces], 1)
    query, key, value, row_sum = (x.flatten(0, 1) for x in (query, key, value, row_sum))

    def rows(index: Tensor, columns: Tensor) -> Tensor:
        weights = (_gather(query, index) @ _gather(key, columns).mT - _gather(row_sum, index)).exp()
        return F.dropout(weights, dropout) @ _gather(value, columns)

    return rows, 0.0


_ROWS = {
    "second_order": _second_order,
    "mean": _virtual_key(geometric=False),
    "geometric": _virtual_key(geometric=True),
    "simple": _simple,
    "none": _unnormalized,
}
