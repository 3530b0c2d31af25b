"""The PyTorch path: what `sketch.rows.attend` computes, head by head in pieces that fit the cache, with linear memory.

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

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .config import SkeinConfig
from .sketch.rows import Selection, overwrite_rows


LOGITS_PER_STEP = 2**18  # logits worked on at a time: with their temporaries a few MB, which a core's cache holds


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

    Only inputs and the selection are kept for the backward pass, which computes one head at a time again.

    Args:
        dropout: Probability with which an attention weight is dropped, from the global generator as in every dropout.

    Returns:
        `[h, n_q, pv]`.
    """
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    outputs = []
    for head, (q, k, v) in enumerate(zip(query.unbind(), key.unbind(), value.unbind(), strict=True)):
        arguments = (q, k, v, _head(selection, head), scale, config, dropout)
        if needs_grad:
            outputs.append(checkpoint(_attend_head, *arguments, use_reentrant=False, preserve_rng_state=dropout > 0))
        else:
            outputs.append(_attend_head(*arguments))
    return torch.stack(outputs)


def _head(selection: Selection, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries by block, their slots, the columns and the exact rows of one head."""
    blocks = selection.blocks
    return blocks.index[head], blocks.slot[head], selection.columns[head], selection.exact_rows[head]


def _attend_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    config: SkeinConfig,
    dropout: float,
) -> Tensor:
    """One head: `[n_q, p]`, `[n_k, p]`, `[n_k, pv]` to `[n_q, pv]`."""
    index, slot, columns, exact_rows = selection
    rows = _ROWS[config.resolved_residual if config.row_normalization == "adaptive" else config.row_normalization]
    rows = rows(key, value, scale, dropout)
    step = max(1, LOGITS_PER_STEP // (index.shape[1] * columns.shape[1]))
    if len(index) == 1:  # one block of all queries: cut it, its columns serve every piece
        pieces = index[0].split(max(1, LOGITS_PER_STEP // columns.shape[1]))
        output = torch.cat([rows(_gather(query, piece[None]), columns)[0] for piece in pieces])
    else:
        pieces = zip(index.split(step), columns.split(step), strict=True)
        output = torch.cat([rows(_gather(query, piece), chosen) for piece, chosen in pieces]).flatten(0, 1)
    output = output[slot]
    if len(exact_rows):
        exact = F.scaled_dot_product_attention(
            query[exact_rows][None], key[None], value[None], dropout_p=dropout, scale=scale
        )[0]
        output = overwrite_rows(output, exact_rows, exact)
    return output


def _second_order(key: Tensor, value: Tensor, scale: float, dropout: float):
    value_mean = value.mean(0)
    value = value - value_mean
    key_second, key_value = scale**2 * (key.T @ key), scale * (key.T @ value)

    def rows(query: Tensor, columns: Tensor) -> Tensor:
        chosen_key, chosen_value = _gather(key, columns), _gather(value, columns)
        rest = len(key) - columns.shape[-1]
        logits = (query * scale) @ chosen_key.mT  # [blocks, m, d]
        a = query @ chosen_key.sum(-2)[..., None] * (-scale / rest)
        second = ((query @ key_second) * query).sum(-1, keepdim=True)
        second = second - torch.linalg.vector_norm(logits, dim=-1, keepdim=True).square()
        z = 1 + (second / rest - a.square()).clamp_min(0) / 2
        top = torch.maximum(logits.detach().amax(-1, keepdim=True), (a + (rest * z).log()).detach())
        exponentials, u = (logits - top).exp_(), (a - top).exp()
        mass = exponentials.sum(-1, keepdim=True) + rest * u * z
        weights = torch.addcmul(exponentials, logits, u, value=-1).sub_(u * (z - a))
        if dropout:
            weights = F.dropout(weights, dropout)
        return (weights @ chosen_value + u * (query @ key_value)) / mass + value_mean

    return rows


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`, by whole rows: `[n, p]` and `[blocks, d]` to `[blocks, d, p]`."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, -1)


def _virtual_key(geometric: bool):
    def prepare(key: Tensor, value: Tensor, scale: float, dropout: float):
        n, key_sum, value_sum = len(key), key.sum(0), value.sum(0)

        def rows(query: Tensor, columns: Tensor) -> Tensor:
            chosen_key, chosen_value = _gather(key, columns), _gather(value, columns)
            rest = n - columns.shape[-1]
            rest_key = chosen_key.mean(-2) if geometric else (key_sum - chosen_key.sum(-2)) / rest
            rest_value = (value_sum - chosen_value.sum(-2)) / rest
            bias = query.new_zeros(columns.shape[-1] + 1)
            bias[-1] = math.log(rest)
            return F.scaled_dot_product_attention(
                query,
                torch.cat([chosen_key, rest_key[:, None]], -2),
                torch.cat([chosen_value, rest_value[:, None]], -2),
                attn_mask=bias.expand(query.shape[-2], -1),
                dropout_p=dropout,
                scale=scale,
            )

        return rows

    return prepare


def _simple(key: Tensor, value: Tensor, scale: float, dropout: float):
    def rows(query: Tensor, columns: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, _gather(key, columns), _gather(value, columns), dropout_p=dropout, scale=scale
        )

    return rows


def _unnormalized(key: Tensor, value: Tensor, scale: float, dropout: float):
    def rows(query: Tensor, columns: Tensor) -> Tensor:
        query = query * scale
        # The true row sums cost n² time; pieces of rows keep the memory linear.
        pieces = query.flatten(0, 1).split(max(1, LOGITS_PER_STEP // len(key)))
        row_sum = torch.cat([torch.logsumexp(piece @ key.T, -1) for piece in pieces]).view(*query.shape[:2], 1)
        weights = (query @ _gather(key, columns).mT - row_sum).exp()
        return F.dropout(weights, dropout) @ _gather(value, columns)

    return rows


_ROWS = {
    "second_order": _second_order,
    "mean": _virtual_key(geometric=False),
    "geometric": _virtual_key(geometric=True),
    "simple": _simple,
    "none": _unnormalized,
}
