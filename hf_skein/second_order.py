"""The second-order residual on the PyTorch path: forward and backward in pieces that fit the cache.

The strata enter as further keys: their means `k̄_c`, `v̄_c` without the columns, with logit bias `log N_c`. What
`sketch.residual.second_order` defines by covariances within strata are sums over all keys less those over the keys of a
block, its columns and its strata, of which there are `N_i` (1 for a column). With the scale in `k`, `r = n - d`:

    [W, X] = Σ_all k_j [k_j, v_j]ᵀ - Σ_i N_i k_i [k_i, v_i]ᵀ
    z = 1 + qᵀWq / 2r,    e_i = N_i exp(q·k_i),    U = Σ_strata e_i
    output · (Σ_columns e_i + U z) = Σ_columns e_i v_i + z Σ_strata e_i v̄_i + U/r Xᵀq
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sketch import strata
from .sketch.gather import flat_index, gather_rows
from .sketch.routing import Blocks
from .sketch.rows import Selection


LOGITS_PER_STEP = 3 * 2**18  # worked on at a time: with their temporaries a few MB, which the cache holds


def attend(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, num_strata: int, scale: float, dropout: float
) -> Tensor:
    """Sketched rows of all heads of one sequence; `selection.exact_rows` are left to the caller.

    Only the inputs, the output and the selection are kept for the backward pass, which computes the pieces again.

    Args:
        query: `[h, n_q, p]`.
        key: `[h, n_k, p]`, with mean zero.
        value: `[h, n_k, pv]`.
        selection: Of either method.
        num_strata: Number of strata.
        scale: Multiplies the logits.
        dropout: Probability with which a column's weight is dropped; the residual is never dropped.

    Returns:
        `[h, n_q, pv]`.
    """
    seed = int(torch.randint(2**62, ())) if dropout else 0  # of the global generator
    tensors = (*selection.blocks, selection.columns, selection.stratum)
    return _SecondOrder.apply(query, key, value, num_strata, scale, dropout, seed, *tensors)


class _SecondOrder(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, num_strata, scale, dropout, seed, index, filled, slot, columns, stratum):
        routed = Blocks(index, filled, slot)
        sketch = _Sketch(query, key, value, num_strata, scale, dropout, seed, routed, columns, stratum)
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        for heads, pieces in sketch.pieces():
            by_slot = query.new_empty(*index[heads].shape, value.shape[-1])
            for blocks, slots in pieces:
                rows = sketch.rows(heads, blocks, slots)
                result = rows.dropped() @ rows.value
                result.addcmul_(rows.linear, rows.share).div_(rows.mass)
                by_slot[:, blocks, slots] = result.add_(sketch.value_mean[heads, None])
            place = flat_index(slot[heads], index[0].numel()).flatten()
            torch.index_select(by_slot.flatten(0, 2), 0, place, out=output[heads].flatten(0, 1))
        return output

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, *ctx.options = inputs[:7]
        ctx.save_for_backward(query, key, value, output, *inputs[7:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        # Entered inside an autocast region it must not compute in lower precision than the forward pass did.
        with torch.autocast(grad_output.device.type, enabled=False):
            return *_gradients(ctx, grad_output), *[None] * 9


def _gradients(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the loss with respect to query, key and value."""
    query, key, value, output, *blocks, columns, stratum = ctx.saved_tensors
    sketch = _Sketch(query, key, value, *ctx.options, Blocks(*blocks), columns, stratum)
    grad_query = torch.empty_like(query)
    grad_table = key.new_empty(*key.shape[:2], key.shape[-1] + value.shape[-1])
    for heads, pieces in sketch.pieces():
        _backward_heads(sketch, heads, pieces, output, grad_output, grad_query, grad_table)
    grad_key, grad_value = grad_table.split([key.shape[-1], value.shape[-1]], -1)
    if sketch.centered:
        grad_mean = grad_output.sum(1, keepdim=True) - grad_value.sum(1, keepdim=True)
        grad_value = grad_value + grad_mean / value.shape[1]
    return grad_query, grad_key * sketch.scale, grad_value


class _Rows(NamedTuple):
    """Some rows of some blocks of some heads, `[h, g, m, ...]`, and the `d` columns and `c` strata that they see.

    Attributes:
        query: `[h, g, m, p]`.
        table: `[h, g, d + c, p + pv]`, the keys and values of columns and strata; `key` and `value` are views of it.
        count: `[h, g, d + c, 1]`, `N_i`.
        members: `[h, g, c, d]`, 1 where a column belongs to a stratum.
        weight: `[h, g, m, d + c]`, `e_i`, times `z` for strata, up to a factor per row.
        kept: `[h, g, m, d]`, the factors of dropout; None without.
        within: `[h, g, p, p + pv]`, `[W, X]`.
        metric: `[h, g, m, p]`, `Wq`.
        linear: `[h, g, m, pv]`, `Xᵀq`.
        z, share, mass: `[h, g, m, 1]`: `z`, `U / r` and the denominator.
    """

    query: Tensor
    table: Tensor
    count: Tensor
    members: Tensor
    weight: Tensor
    kept: Tensor | None
    within: Tensor
    metric: Tensor
    linear: Tensor
    z: Tensor
    share: Tensor
    mass: Tensor

    @property
    def key(self) -> Tensor:
        return self.table[..., : self.query.shape[-1]]

    @property
    def value(self) -> Tensor:
        return self.table[..., self.query.shape[-1] :]

    def dropped(self) -> Tensor:
        """The weights after dropout."""
        if self.kept is None:
            return self.weight
        columns, means = self.weight.tensor_split([self.kept.shape[-1]], -1)
        return torch.cat([columns * self.kept, means], -1)


class _Sketch:
    """The inputs, sums over all keys, and how the work is cut into pieces. Every pass draws the same dropout."""

    def __init__(self, query, key, value, num_strata, scale, dropout, seed, blocks: Blocks, columns, stratum):
        self.query, self.scale, self.blocks, self.columns, self.stratum = query, scale, blocks, columns, stratum
        self.rest = key.shape[1] - columns.shape[-1]
        # Rounding is smaller without the mean value; but a column that is dropped loses all of its value.
        self.centered = not dropout
        self.value_mean = value.mean(1, keepdim=True) * self.centered
        self.key, self.value = key, value - self.value_mean if self.centered else value
        key_total, value_total, self.size = strata.sums(stratum, num_strata, key, self.value)
        self.total = torch.cat([scale * key_total, value_total], -1)
        self.all_keys = torch.cat([scale**2 * (key.mT @ key), scale * (key.mT @ self.value)], -1)
        self.labels = torch.arange(num_strata, device=key.device)[:, None]
        self.dropout, self.generator = dropout, None
        if dropout:
            self.generator = torch.Generator(query.device).manual_seed(seed)

    def pieces(self) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
        """Slices of heads, and for each the slices of blocks and of slots within a block."""
        heads, n_blocks, size = self.blocks.index.shape
        rows = max(1, LOGITS_PER_STEP // (self.columns.shape[-1] + len(self.labels)))
        pieces = [(b, s) for b in _slices(n_blocks, rows // size) for s in _slices(size, rows)]
        for h in _slices(heads, rows // (size * n_blocks)):
            yield h, pieces

    def rows(self, heads: slice, blocks: slice, slots: slice) -> _Rows:
        query = gather_rows(self.query[heads], self.blocks.index[heads, blocks, slots])
        columns = self.columns[heads, blocks]
        chosen = [self.scale * gather_rows(self.key[heads], columns), gather_rows(self.value[heads], columns)]
        chosen = torch.cat(chosen, -1)
        stratum = self.stratum[heads].gather(1, columns.flatten(1)).view_as(columns)
        members = (stratum[..., None, :] == self.labels).to(query.dtype)
        size = self.size[heads, None] - members.sum(-1, keepdim=True)
        means = (self.total[heads, None] - members @ chosen) / size.clamp_min(1)
        table = torch.cat([chosen, means], -2)
        count = torch.cat([size.new_ones(*columns.shape, 1), size], -2)
        key, d = table[..., : query.shape[-1]], columns.shape[-1]
        within = self.all_keys[heads, None] - (key * count).mT @ table

        metric, linear = (query @ within).tensor_split([query.shape[-1]], -1)
        z = 1 + ((metric * query).sum(-1, keepdim=True) / self.rest).clamp_min(0) / 2
        bias = count.log().mT.flatten(0, 1)
        logits = torch.baddbmm(bias, query.flatten(0, 1), key.mT.flatten(0, 1)).unflatten(0, query.shape[:2])
        weight = logits.softmax(-1)  # one pass over them instead of three
        u = weight[..., d:].sum(-1, keepdim=True)
        mass = 1 + u * (z - 1)
        weight[..., d:] *= z
        kept = None
        if self.dropout:
            kept = torch.empty_like(weight[..., :d]).bernoulli_(1 - self.dropout, generator=self.generator)
            kept /= max(1 - self.dropout, torch.finfo(kept.dtype).tiny)  # all are zero where this is
        return _Rows(query, table, count, members, weight, kept, within, metric, linear, z, u / self.rest, mass)


def _backward_heads(
    sketch: _Sketch,
    heads: slice,
    pieces: list[tuple[slice, slice]],
    output: Tensor,
    grad_output: Tensor,
    grad_query: Tensor,
    grad_table: Tensor,
) -> None:
    """Fill the gradients of some heads."""
    index, slot, filled = sketch.blocks.index[heads], sketch.blocks.slot[heads], sketch.blocks.filled
    output, grad_output = output[heads], grad_output[heads]
    columns, rest = sketch.columns[heads], sketch.rest
    p, d = sketch.query.shape[-1], columns.shape[-1]
    query_by_slot = sketch.query.new_empty(*index.shape, p)
    grad_chosen = query_by_slot.new_zeros(*columns.shape, grad_table.shape[-1])
    grad_total, grad_all_keys = torch.zeros_like(sketch.total[heads]), torch.zeros_like(sketch.all_keys[heads])
    for blocks, slots in pieces:
        x = sketch.rows(heads, blocks, slots)
        place = index[:, blocks, slots]
        grad = gather_rows(grad_output, place) * filled[blocks, slots, None]
        mu = (grad * (gather_rows(output, place) - sketch.value_mean[heads, None])).sum(-1, keepdim=True) / x.mass
        grad /= x.mass
        # Of the numerator with respect to the weights; then of the loss, with respect to the logits.
        of_weight = grad @ x.value.mT
        of_linear = grad @ x.within[..., p:].mT
        of_share = (of_linear * x.query).sum(-1, keepdim=True)
        of_z = (x.weight[..., d:] * of_weight[..., d:]).sum(-1, keepdim=True) / x.z - mu * x.share * rest
        curvature = of_z * (x.z > 1) / rest
        if x.kept is not None:
            of_weight[..., :d] *= x.kept
        of_weight -= mu
        of_weight[..., d:] += of_share / (rest * x.z)
        grad_logits = of_weight.mul_(x.weight)

        grad_rows = grad_logits @ x.key
        query_by_slot[:, blocks, slots] = grad_rows.addcmul_(x.metric, curvature).addcmul_(of_linear, x.share)
        grad_within = x.query.mT @ torch.cat([x.query * (curvature / 2), grad * x.share], -1)
        grad_all_keys += grad_within.sum(1)
        # A key of the block is in W and X twice: as the left factor and in the right one.
        grad_keys = torch.cat([grad_logits.mT @ x.query, x.dropped().mT @ grad], -1)
        grad_keys -= (x.key @ grad_within) * x.count
        grad_keys[..., :p] -= (x.table @ grad_within.mT) * x.count
        grad_means = grad_keys[..., d:, :] / x.count[..., d:, :].clamp_min(1)
        grad_total += grad_means.sum(1)
        grad_chosen[:, blocks] += grad_keys[..., :d, :] - x.members.mT @ grad_means

    grad_query[heads] = gather_rows(query_by_slot.flatten(1, 2), slot)
    result = gather_rows(grad_total, sketch.stratum[heads])
    key, value = sketch.key[heads], sketch.value[heads]
    of_keys, of_values = grad_all_keys.tensor_split([p], -1)
    result += key @ (sketch.scale * torch.cat([of_keys + of_keys.mT, of_values], -1))
    result[..., :p] += value @ of_values.mT
    result.flatten(0, 1).index_add_(0, flat_index(columns, key.shape[1]).flatten(), grad_chosen.flatten(0, 2))
    grad_table[heads] = result


def _slices(length: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]
