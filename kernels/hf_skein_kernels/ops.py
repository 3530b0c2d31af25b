"""The operators `hf_skein::select`, `hf_skein::attend` and its gradient, and `skein_attention`, which composes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import attention, selection
from . import exact_rows as exact
from .layout import Layout, Selection, num_blocks, ragged
from .residual import residual
from .tiles import INTERPRETED


# Of the operators. Loaded from the Hub the package has another, unique name, and so have they.
NAMESPACE = "hf_skein" if __package__ == "hf_skein.kernels" else __package__.replace(".", "_")

_NUM_SELECTION = len(Selection._fields)

KINDS = ("second_order", "mean", "geometric", "simple")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MAX_PILOTS = 65535  # CUDA's limit of a grid but for its first axis
LARGE_HEADS_MEMORY = 114688  # bytes of shared memory of heads of more than 128 numbers: the record of what was compiled
LEAST_CAPABILITY = (8, 0)  # Triton's on CUDA; every GPU of ROCm has a higher one

# --- operators ---


@torch.library.custom_op(f"{NAMESPACE}::select", mutates_args=())
def select(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    method: str,
    most_blocks: int,
    block_size: int,
    exact_length: int,
    num_columns: int,
    num_strata: int,
    num_pilots: int,
    exact_rows: int,
    pilot_reutilization: bool,
    uniform: bool,
    seed: int,
    layer: int,
    scale: float,
) -> list[Tensor]:
    """What `attend` takes as `constants`. Arguments as in `skein_attention`; `most_blocks` is `max_blocks` there.

    `columns` have room for `most_blocks` blocks, rounded down to a power of two, so that shapes do not follow from how
    many blocks a length makes.
    """
    with _beside(query):
        layout = ragged(query_mask, key_mask, query, key, block_size, most_blocks, exact_length)
        if method == "adaptive":
            key_mean, value_mean, selected = selection.adaptive(
                query, key, value, layout, scale=scale,
                blocks=num_blocks(query.shape[2], block_size, most_blocks), room=_floor_power(most_blocks),
                num_columns=num_columns, num_strata=num_strata, num_pilots=num_pilots, exact_rows=exact_rows,
                uniform=uniform, seed=seed, layer=layer,
            )  # fmt: skip
        else:
            key_mean, value_mean, selected = selection.skeinformer(
                query, key, value, layout, scale=scale, num_columns=num_columns, num_strata=num_strata,
                num_pilots=num_pilots, pilot_reutilization=pilot_reutilization, uniform=uniform, seed=seed,
                layer=layer,
            )  # fmt: skip
        return [key_mean, value_mean, *selected, *layout]


@select.register_fake
def _(
    query, key, value, query_mask, key_mask, method, most_blocks, block_size, exact_length, num_columns, num_strata,
    num_pilots, exact_rows, pilot_reutilization, uniform, *others,
):  # fmt: skip
    batch, heads, n_q, p = query.shape
    kv_heads, n_k, pv = value.shape[1:]
    if method == "adaptive":
        exact_rows = min(exact_rows, n_q)
    else:
        exact_rows = num_pilots if pilot_reutilization else 0

    def empty(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
        return [query.new_empty(batch, *shape, dtype=dtype) for shape in shapes]

    positions = (heads, n_q), (heads, _floor_power(most_blocks), num_columns), (heads, exact_rows), (kv_heads, n_k)
    return [
        *empty(torch.float32, (kv_heads, p), (kv_heads, pv)),
        *empty(torch.int32, *positions),
        *empty(torch.float32, (heads, exact_rows, pv), (heads, exact_rows)),
        *empty(torch.int32, (n_q,), (), (n_k,), (), ()),
    ]


@torch.library.custom_op(f"{NAMESPACE}::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    constants: list[Tensor],
    dropout_seed: Tensor | None,
    is_ragged: bool,
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
        is_ragged: Whether anything may be padding.
        most_blocks: As `max_blocks` in `num_blocks`.
        block_size: Likewise.
        num_strata: Number of strata; 1 for the residuals that know none.
        kind: The residual: `"second_order"`, `"mean"`, `"geometric"`, or `"simple"` for none.
        scale: Multiplies the logits.
        dropout: Probability of dropping the weight of a key; the residual is never dropped.

    Returns:
        `[B, H, n_q, pv]` in the dtype of `query`, laid out in memory as `[B, n_q, H, pv]`, and `[B, H, n_q]` float32,
        the logarithm (to base 2) of each row's mass; zeros in rows of padding.
    """
    out, lse = _outputs(query, value)
    if is_ragged:
        out.zero_()
        lse.zero_()
    with _beside(query):
        means, centres, chosen, layout = _unpack(constants, query, most_blocks, block_size, dropout)
        rest = residual(key, value, means, centres, chosen, layout, _strata(num_strata, kind), kind)
        seed = layout.blocks if dropout_seed is None else dropout_seed  # not read without dropout
        attention.forward(query, key, value, *centres, chosen, layout, rest, scale, dropout, seed, out, lse)
        exact.forward(query, key, value, chosen, layout, is_ragged, scale, dropout, seed, out, lse)
    return out, lse


@attend.register_fake
def _(query, key, value, constants, dropout_seed, *options):
    return _outputs(query, value)


@torch.library.custom_op(f"{NAMESPACE}::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    constants: list[Tensor],
    dropout_seed: Tensor | None,
    is_ragged: bool,
    most_blocks: int,
    block_size: int,
    num_strata: int,
    kind: str,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, given that of the output `[B, H, n_q, pv]`. Otherwise as `attend`."""
    grads = _gradients(query, key, value)
    if is_ragged:
        grads[0].zero_()
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    with _beside(query):
        means, centres, chosen, layout = _unpack(constants, query, most_blocks, block_size, dropout)
        rest = residual(key, value, means, centres, chosen, layout, _strata(num_strata, kind), kind)
        seed = layout.blocks if dropout_seed is None else dropout_seed
        common = scale, dropout, seed, out, lse, grad
        exact_grads = exact.backward(query, key, value, chosen.exact_rows, layout, is_ragged, *common, grads[0])
        attention.backward(
            query, key, value, *centres, chosen, layout, rest, kind == "geometric", *common, *grads, exact_grads
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


@contextmanager
def _beside(x: Tensor) -> Iterator[None]:
    """Launches go to the device of `x`, whichever is current; autocast casts nothing."""
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        yield


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
    """The two means, what is subtracted from keys and values, the selection and the layout.

    Blocks that not even the padded length needs are cut off.
    """
    key_mean, value_mean, *rest = constants
    chosen, layout = Selection(*rest[:_NUM_SELECTION]), Layout(*rest[_NUM_SELECTION:])
    blocks = num_blocks(query.shape[2], block_size, most_blocks)
    chosen = chosen._replace(columns=chosen.columns[:, :, :blocks].contiguous())
    # A column that is dropped loses all of its value.
    centres = key_mean, torch.zeros_like(value_mean) if dropout else value_mean
    return (key_mean, value_mean), centres, chosen, layout


def _floor_power(n: int) -> int:
    return 1 << (n.bit_length() - 1)


# --- the public function ---


def skein_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    *,
    method: str = "adaptive",
    kind: str = "second_order",
    scale: float | None = None,
    num_columns: int = 128,
    num_strata: int = 64,
    num_pilots: int = 1,
    block_size: int = 128,
    max_blocks: int = 8,
    exact_rows: int = 1,
    exact_length: int = 512,
    pilot_reutilization: bool = True,
    uniform: bool = False,
    seed: int = 0,
    layer: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """Bidirectional attention by a sketch; every sequence from its valid tokens alone.

    It never waits for the device and launches what the padded lengths need at most, so CUDA graphs can capture it.

    Args:
        query: `[B, H, n_q, p]`, float16, bfloat16 or float32; heads of up to 256 numbers.
        key: `[B, HK, n_k, p]`; `HK` divides `H`.
        value: `[B, HK, n_k, pv]`.
        key_mask: `[B, n_k]` bool, True for valid keys; None if all are.
        query_mask: `[B, n_q]` bool, likewise. Rows of other queries are zero.
        method: `"adaptive"` or `"skeinformer"`.
        kind: What stands for keys that are not columns: `"second_order"`, `"mean"`, `"geometric"`, or `"simple"` for
            nothing.
        scale: Multiplies the logits; default `p**-0.5`.
        num_columns: Keys that each query attends to exactly.
        num_strata: Groups of keys that are summarised by their means, if `kind` is `"second_order"`.
        num_pilots: Parts per block whose mean queries choose the columns, or (skeinformer) random rows that do.
        block_size: Most queries of a block, unless there were more than `max_blocks` blocks.
        max_blocks: Most blocks, rounded down to a power of two.
        exact_rows: The first valid queries, which attend to everything (adaptive).
        exact_length: A sequence of at most so many valid keys, at least `num_columns`, is computed exactly.
        pilot_reutilization: Compute the pilot rows exactly (skeinformer).
        uniform: Draw all columns with the same probability.
        seed: Of the random numbers of selection, from 0 to 2**32 - 1.
        layer: Likewise.
        dropout: Probability of dropping the weight of a key, from PyTorch's global generator. The residual stays.

    Returns:
        `[B, H, n_q, pv]`, laid out in memory as `[B, n_q, H, pv]`.

    Raises:
        ValueError: A dtype, a head dimension, a device or an option that the kernels do not have.
    """
    if method != "adaptive":  # one block
        block_size, max_blocks = 2**31 - 1, 1
    if kind != "second_order":
        num_strata = 1
    _check(query, value, method, kind, num_columns, exact_length, min(max_blocks, query.shape[2]) * num_pilots)
    if query.shape[2] == 0 or key.shape[2] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if scale is None:
        scale = query.shape[-1] ** -0.5
    constants = select(
        query.detach(), key.detach(), value.detach(), query_mask, key_mask, method, max_blocks, block_size,
        exact_length, num_columns, num_strata, num_pilots, exact_rows, pilot_reutilization, uniform, seed, layer, scale,
    )  # fmt: skip
    dropout_seed = torch.randint(2**62, (1,), device=query.device) if dropout else None
    # Without masks too, where the batch is short enough to be computed exactly.
    is_ragged = query_mask is not None or key_mask is not None or key.shape[2] <= exact_length
    return attend(
        query, key, value, constants, dropout_seed, is_ragged, max_blocks, block_size, num_strata, kind, scale, dropout
    )[0]


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _shared_memory(device: torch.device) -> int:
    """Bytes of one program at most, where PyTorch tells."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", sys.maxsize)


def why_not(query: Tensor, value: Tensor, num_pilots: int = 1) -> str | None:
    """The reason why the kernels cannot run on these inputs, or None if they can.

    Args:
        query: `[B, H, n_q, p]`.
        value: `[B, HK, n_k, pv]`.
        num_pilots: Pilots of a head, of all its blocks together.
    """
    largest = max(query.shape[-1], value.shape[-1])
    if not INTERPRETED.value:
        if query.device.type != "cuda":
            return (
                f"it needs a CUDA or ROCm device (or TRITON_INTERPRET=1, for tests); the inputs are on {query.device}"
            )
        if (capability := _capability(query.device)) < LEAST_CAPABILITY:
            return f"it needs a GPU of compute capability {LEAST_CAPABILITY}; {query.device} has {capability}"
        needs_much = largest > 128 and torch.version.hip is None
        if needs_much and (memory := _shared_memory(query.device)) < LARGE_HEADS_MEMORY:
            return (
                f"heads of more than 128 numbers need {LARGE_HEADS_MEMORY} bytes of shared memory; {query.device} has "
                f"{memory}"
            )
    if query.dtype not in DTYPES:
        return f"it knows {', '.join(str(x) for x in DTYPES)}; the inputs are {query.dtype}"
    if largest > MAX_HEAD_DIM:
        return f"it knows heads of up to {MAX_HEAD_DIM} numbers; the inputs have {largest}"
    if num_pilots > MAX_PILOTS:
        return f"it knows up to {MAX_PILOTS} pilots (max_blocks times num_pilots); there may be {num_pilots}"
    return None


def _check(
    query: Tensor,
    value: Tensor,
    method: str,
    kind: str,
    num_columns: int,
    exact_length: int,
    num_pilots: int,
) -> None:
    if reason := why_not(query, value, num_pilots):
        raise ValueError(f"Triton cannot compute this: {reason}.")
    if method not in ("adaptive", "skeinformer") or kind not in KINDS:
        raise ValueError(
            f"method is {method!r} and kind {kind!r}; allowed are 'adaptive' and 'skeinformer', and {KINDS}."
        )
    if exact_length < num_columns:
        raise ValueError(f"exact_length is {exact_length}; it must be at least num_columns ({num_columns}).")
