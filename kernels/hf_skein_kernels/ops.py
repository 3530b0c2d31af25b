"""The operators `hf_skein::attend` and its gradient, as PyTorch sees them: shapes for `torch.compile`, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from . import attention
from . import exact_rows as exact
from .layout import Layout, Selection, num_blocks
from .residual import residual


_NUM_SELECTION = len(Selection._fields)


# --- operators ---


@torch.library.custom_op("hf_skein::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    constants: list[Tensor],
    dropout_seed: Tensor | None,
    ragged: bool,
    most_blocks: int,
    block_size: int,
    num_strata: int,
    kind: str,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Attention, given a selection.

    Args:
        query: `[B, H, n_q, p]`, last stride 1.
        key: `[B, HK, n_k, p]`, last stride 1.
        value: `[B, HK, n_k, pv]`, last stride 1.
        constants: The means of keys `[B, HK, p]` and values `[B, HK, pv]`, float32; a `Selection`, marked by
            `mark_exact`; a `Layout`.
        dropout_seed: `[1]` int64; None without dropout.
        ragged: Whether anything may be padding.
        most_blocks: As `max_blocks` in `num_blocks`.
        block_size: Likewise.
        num_strata: Number of strata; 1 for the residuals that know none.
        kind: The residual: `"second_order"`, `"mean"`, `"geometric"`, or `"simple"` for none.
        scale: Multiplies the logits.
        dropout: Probability of dropping the weight of a key; the residual is never dropped.

    Returns:
        `[B, H, n_q, pv]` in the dtype of `query`, laid out in memory as `[B, n_q, H, pv]`, and `[B, H, n_q]` float32,
        the logarithm (to base 2) of each row's mass.
    """
    out, lse = _outputs(query, value)
    if ragged:
        out.zero_()
    with torch.autocast(query.device.type, enabled=False):
        means, selection, layout = _unpack(constants, query, most_blocks, block_size, dropout)
        rest = residual(key, value, *means, selection, layout, _strata(num_strata, kind), kind)
        seed = layout.blocks if dropout_seed is None else dropout_seed  # not read without dropout
        attention.forward(query, key, value, *means, selection, layout, rest, scale, dropout, seed, out, lse)
        exact.forward(query, key, value, selection.exact_rows, layout, ragged, scale, dropout, seed, out, lse)
    return out, lse


@attend.register_fake
def _(query, key, value, constants, dropout_seed, *options):
    return _outputs(query, value)


@torch.library.custom_op("hf_skein::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    constants: list[Tensor],
    dropout_seed: Tensor | None,
    ragged: bool,
    most_blocks: int,
    block_size: int,
    num_strata: int,
    kind: str,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, given that of the output `[B, H, n_q, pv]`. Otherwise as `attend`."""
    grads = _gradients(query, key, value)
    if ragged:
        grads[0].zero_()
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    with torch.autocast(query.device.type, enabled=False):
        means, selection, layout = _unpack(constants, query, most_blocks, block_size, dropout)
        rest = residual(key, value, *means, selection, layout, _strata(num_strata, kind), kind)
        seed = layout.blocks if dropout_seed is None else dropout_seed
        common = scale, dropout, seed, out, lse, grad
        exact_grads = exact.backward(query, key, value, selection.exact_rows, layout, ragged, *common, grads[0])
        attention.backward(
            query, key, value, *means, selection, layout, rest, kind == "geometric", *common, *grads, exact_grads
        )
    return grads


@attend_backward.register_fake
def _(grad, query, key, value, *others):
    return _gradients(query, key, value)


def _save(ctx, inputs, output):
    query, key, value, constants, dropout_seed, *ctx.options = inputs
    ctx.num_constants = len(constants)
    ctx.save_for_backward(query, key, value, *output, *constants, dropout_seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse):
    query, key, value, out, lse, *constants, dropout_seed = ctx.saved_tensors
    grads = 3 * (None,)
    if grad is not None:
        grads = attend_backward(grad, query, key, value, out, lse, constants, dropout_seed, *ctx.options)
    return *grads, [None] * ctx.num_constants, None, *[None] * len(ctx.options)


attend.register_autograd(_backward, setup_context=_save)


# --- what they share ---


def _outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, n, _ = query.shape
    out = query.new_empty(batch, n, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, n, dtype=torch.float32)


def _gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Laid out like the inputs where these are dense, so that no view upstream needs a copy."""
    return tuple(torch.empty_like(x) for x in inputs)


def _strata(num_strata: int, kind: str) -> int:
    return 0 if kind == "simple" else num_strata


def _unpack(constants: list[Tensor], query: Tensor, most_blocks: int, block_size: int, dropout: float):
    """The two means, the selection and the layout. Blocks that not even the padded length needs are cut off."""
    key_mean, value_mean, *rest = constants
    selection, layout = Selection(*rest[:_NUM_SELECTION]), Layout(*rest[_NUM_SELECTION:])
    blocks = num_blocks(query.shape[2], block_size, most_blocks)
    selection = selection._replace(columns=selection.columns[:, :, :blocks].contiguous())
    if dropout:  # a column that is dropped loses all of its value
        value_mean = torch.zeros_like(value_mean)
    return (key_mean, value_mean), selection, layout
