"""`skein_attention`: checks, the exact shortcuts, and the choice of the path. Knows nothing of Transformers."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import torch_path
from .config import SkeinConfig
from .sketch import adaptive, rows, skeinformer
from .sketch.baselines import v_mean


_SELECT = {"adaptive": adaptive.select, "skeinformer": skeinformer.select}

# Some heads after others, so that the many passes over their queries, keys and values find them in the cache.
NUMBERS_PER_STEP = 2**22

_KEEP_BYTES = 2**25 - 2**16  # just below the most that glibc lets its thresholds grow to

logger = logging.getLogger(__name__)

_HAS_TRITON = importlib.util.find_spec("triton") is not None

_DROPPED = -1000.0  # no logit survives this or less


def skein_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    config: SkeinConfig | None = None,
    *,
    query_mask: Tensor | None = None,
    global_mask: Tensor | None = None,
    layer: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """Bidirectional attention by a sketch whose cost is linear in the length; exact for sequences short enough.

    Every sequence is computed from its valid tokens alone: batch neighbours and padding do not change it. Rows of
    queries that are padding are zero, unless `n_k` is short enough for the whole batch to be computed exactly.

    Args:
        query: `[batch, heads, n_q, p]`, any floating dtype.
        key: `[batch, kv_heads, n_k, p]`; `kv_heads` divides `heads` (grouped queries).
        value: `[batch, kv_heads, n_k, pv]`.
        attention_mask: `[batch, n_k]` (or `[batch, 1, 1, n_k]`): bool or integer 0/1 with 1 for valid keys, or additive
            float with 0 for valid keys and a large negative number for padding. `None`: every key is valid.
        scaling: Multiplies the logits; default `p**-0.5`.
        config: The settings; default `SkeinConfig()`.
        query_mask: `[batch, n_q]` like `attention_mask`, for the queries. Default: `attention_mask` if `n_q == n_k`
            (self-attention), else every query is valid. Pass it for cross-attention of equal lengths.
        global_mask: `[batch, n]`, bool or 0/1, of self-attention: a token marked here attends to everything exactly and
            is a column of every query, on top of `num_columns`. Marks in the padding count for nothing.
        layer: Index of the layer: per-layer overrides, and the key of the random numbers.
        dropout: Probability of dropping an attention weight; pass 0 outside training.

    Returns:
        `[batch, heads, n_q, pv]`, in the dtype of `query`.

    Raises:
        ValueError: Shapes, dtypes or the mask do not fit, or `backend="triton"` cannot compute this; the message says
            what was given and what is expected.
    """
    config = (SkeinConfig() if config is None else config).for_layer(layer)
    _check_shapes(query, key, value)
    global_mask = _global_mask(global_mask, query, key, query_mask, config)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    n_q, n_k = query.shape[2], key.shape[2]
    mask = _padding_mask(attention_mask, "attention_mask", query.shape[0], n_k)
    if query_mask is None:
        query_mask = mask if n_q == n_k else None
    else:
        query_mask = _padding_mask(query_mask, "query_mask", query.shape[0], n_q)
    is_sketched = config.method != "exact" and n_k > config.exact_length and query.shape[0] * n_q > 0
    if is_sketched and _backend(config, query, value, global_mask) == "triton":
        return _by_kernels(query, key, value, mask, query_mask, scaling, config, layer, dropout)
    mask, query_mask = _none_if_all(mask), _none_if_all(query_mask)

    if config.method == "exact" or n_k <= config.exact_length:
        return exact_attention(query, key, value, mask, scaling, dropout, query_mask)
    if query.shape[0] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    sequences = zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
    heads = [
        some_heads
        for i, (q, k, v) in enumerate(sequences)
        for some_heads in _one_sequence(
            q,
            k,
            v,
            _valid(mask, i),
            _valid(query_mask, i),
            None if global_mask is None else global_mask[i],
            scaling=scaling,
            config=config,
            layer=layer,
            dropout=dropout,
        )
    ]
    output = heads[0] if len(heads) == 1 else torch.cat(heads)
    return output.view(*query.shape[:3], value.shape[-1])


# --- kernels ---


def _backend(config: SkeinConfig, query: Tensor, value: Tensor, global_mask: Tensor | None = None) -> str:
    """The backend of one call: `auto` resolved, and whatever `triton` cannot do refused."""
    if config.backend in ("torch", "reference") or (config.backend == "auto" and query.device.type != "cuda"):
        return config.backend
    reason = why_no_kernels(config, query, value) if global_mask is None else "global tokens have no kernel"
    if reason is None:
        return "triton"
    if config.backend == "triton":
        raise ValueError(f'backend="triton" cannot compute this: {reason}. Use backend="auto" or "torch".')
    _log_no_kernels(reason)
    return "torch"


def why_no_kernels(config: SkeinConfig, query: Tensor, value: Tensor) -> str | None:
    """The reason why the Triton kernels cannot compute this, or None if they can."""
    if config.method == "vmean":
        return 'method="vmean" has no kernel'
    if config.row_normalization == "none":
        return 'row_normalization="none", an ablation, has no kernel'
    if not _HAS_TRITON:
        return "triton is not installed"
    from . import kernels  # triton takes a while to load, and is not there on every platform

    pilots = min(config.max_blocks, query.shape[2]) * (config.num_pilots or 1) if config.method == "adaptive" else 1
    return kernels.why_not(query, value, pilots)


@functools.cache
def _log_no_kernels(reason: str) -> None:
    logger.warning(f"skein: the PyTorch path runs instead of the Triton kernels: {reason}.")


def _by_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_mask: Tensor | None,
    scale: float,
    config: SkeinConfig,
    layer: int,
    dropout: float,
) -> Tensor:
    from . import kernels

    is_adaptive = config.method == "adaptive"
    return kernels.skein_attention(
        query,
        key,
        value,
        mask,
        query_mask,
        method=config.method,
        kind=config.resolved_residual if config.row_normalization == "adaptive" else config.row_normalization,
        scale=scale,
        num_columns=config.num_columns,
        num_strata=config.resolved_strata,
        num_pilots=config.num_pilots or (1 if is_adaptive else config.num_columns),
        block_size=config.block_size,
        max_blocks=config.max_blocks,
        exact_rows=config.exact_rows,
        exact_length=config.exact_length,
        pilot_reutilization=config.pilot_reutilization,
        uniform=config.column_sampling == "uniform",
        seed=config.seed,
        layer=layer,
        dropout=dropout,
    )


# --- exact attention ---


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Exact bidirectional attention by PyTorch's fused kernel. Arguments as in `skein_attention`; masks are bool.

    A sequence without a valid key gives zeros.
    """
    if query_mask is not None:
        query = query.masked_fill(~query_mask[:, None, :, None], 0)
    if mask is not None:
        # What stands in the padding, NaN included, must not survive a weight of zero.
        key, value = (x.masked_fill(~mask[:, None, :, None], 0) for x in (key, value))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask[:, None, None, :],
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output if mask is None else output.masked_fill(~mask.any(-1)[:, None, None, None], 0)


def valid_from_additive(mask: Tensor) -> Tensor | None:
    """An additive `mask` as bool with True for valid, if it only adds zero or what no logit survives; else None."""
    dropped = mask <= _DROPPED
    return ~dropped if bool((dropped | (mask == 0)).all()) else None


# --- the other backends, sequence by sequence ---


def _one_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    valid_query: Tensor | None,
    is_global: Tensor | None,
    *,
    scaling: float,
    config: SkeinConfig,
    layer: int,
    dropout: float,
) -> Iterator[Tensor]:
    """The output of one sequence, some heads `[h, n_q, pv]` after others; its padding is taken out and put back."""
    n_q = query.shape[1]
    query, key, value = _take(query, valid_query), _take(key, valid), _take(value, valid)
    marked = None if is_global is None else _take(is_global[None], valid)[0].nonzero().squeeze(-1)
    if query.shape[1] == 0 or key.shape[1] == 0:
        outputs = [query.new_zeros(*query.shape[:2], value.shape[-1])]
    elif key.shape[1] <= max(config.exact_length, config.num_columns + (0 if marked is None else len(marked))):
        outputs = exact_attention(query[None], key[None], value[None], None, scaling, dropout)
    elif config.method == "vmean":
        outputs = [v_mean(query, value.repeat_interleave(len(query) // len(value), 0))]
    else:
        outputs = _sketch(query, key, value, marked, scaling, config, layer, dropout)
    for output in outputs:
        yield _put_back(output.to(query.dtype), valid_query, n_q)


@functools.cache
def _keep_freed_memory() -> None:
    """Lets the temporaries of one step have the memory of the step before, without page faults.

    glibc returns a large block to the system when it is freed, and the next one costs a page fault every 4 KiB, which
    is as much as many a pass over it. Freeing one block of almost 32 MiB raises, for the process, the size up to which
    blocks are kept, and what may stay free to twice that: at most 64 MiB. Elsewhere it does nothing.
    """
    torch.empty(_KEEP_BYTES, dtype=torch.uint8)


def _sketch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    marked: Tensor | None,
    scale: float,
    config: SkeinConfig,
    layer: int,
    dropout: float,
) -> Iterator[Tensor]:
    """`[heads, n_q, p]`, `[kv_heads, n_k, p]`, `[kv_heads, n_k, pv]` of one sequence to some heads `[h, n_q, pv]`."""
    if config.backend == "reference" and dropout:
        raise ValueError('backend="reference" has no dropout; use backend="torch" for training with dropout.')
    if query.device.type == "cpu":
        _keep_freed_memory()
    group = len(query) // len(key)
    step = max(1, NUMBERS_PER_STEP // (group * query.shape[1] * query.shape[2]))  # key heads at a time
    heads = torch.arange(len(query), device=query.device).split(group * step)
    # Split, not sliced: the gradient of a slice is as large as the whole.
    for q, k, v, head in zip(query.split(group * step), key.split(step), value.split(step), heads, strict=True):
        with torch.autocast(query.device.type, enabled=False):  # or it would undo the conversion to float32
            dtype = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
            # Transformers passes transposed views: with the rows of a head side by side no later step has to copy.
            q, v = (x.to(dtype, memory_format=torch.contiguous_format).contiguous() for x in (q, v))
            k = k.to(dtype, copy=True, memory_format=torch.contiguous_format)
            # Softmax does not change when every key moves by the same vector; centred keys have the smaller logits.
            k -= k.mean(-2, keepdim=True)
            if group > 1:
                k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            selection = _SELECT[config.method](q, k, v, scale, config, layer, head, marked)
            if config.backend == "reference":
                output = rows.attend(q, k, v, selection, scale, config)
            else:
                output = torch_path.attend(q, k, v, selection, scale, config, dropout)
        yield output


def _take(x: Tensor, index: Tensor | slice | None) -> Tensor:
    return x if index is None else x[:, index]


def _put_back(x: Tensor, index: Tensor | slice | None, n: int) -> Tensor:
    if index is None:
        return x
    if isinstance(index, slice):
        return F.pad(x, (0, 0, 0, n - x.shape[1]))
    return x.new_zeros(x.shape[0], n, x.shape[2]).index_copy(1, index, x)


def _valid(mask: Tensor | None, row: int) -> Tensor | slice | None:
    """Positions of the valid tokens of one sequence: all, a prefix (no copy needed), or a list."""
    if mask is None:
        return None
    index = mask[row].nonzero().squeeze(-1)
    if len(index) == mask.shape[1]:
        return None
    is_prefix = len(index) == 0 or int(index[-1]) == len(index) - 1
    return slice(0, len(index)) if is_prefix else index


def _global_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, query_mask: Tensor | None, config: SkeinConfig
) -> Tensor | None:
    """`mask` as `[batch, n]` bool; None if it marks nothing."""
    if mask is None:
        return None
    batch, n = query.shape[0], query.shape[2]
    if n != key.shape[2] or query_mask is not None:
        raise ValueError(
            "global_mask marks tokens of self-attention, which are queries and keys alike; got "
            f"{n} queries, {key.shape[2]} keys and {'no' if query_mask is None else 'a'} query_mask."
        )
    if mask.shape not in ((batch, n), (1, n)) or not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"global_mask must hold 0 and 1 in [batch, n] = [{batch}, {n}], 1 for global tokens; got "
            f"{tuple(mask.shape)} with values from {mask.min().item()} to {mask.max().item()}."
        )
    if config.method == "vmean":
        raise ValueError('method="vmean" knows no global tokens; use another method, or no global_mask.')
    mask = mask.bool().expand(batch, n)
    return mask if bool(mask.any()) else None


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not (query.ndim == key.ndim == value.ndim == 4):
        raise ValueError(
            "query, key and value must be [batch, heads, n, p]; got shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
        )
    if not query.is_floating_point() or not (query.dtype == key.dtype == value.dtype):
        raise ValueError(
            f"query, key and value must have one floating dtype; got {query.dtype}, {key.dtype}, {value.dtype}."
        )
    fits = (
        query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[-1] == key.shape[-1]
        and key.shape[1:3] == value.shape[1:3]
    )
    if not fits:
        raise ValueError(
            "query [batch, heads, n_q, p], key [batch, kv_heads, n_k, p] and value [batch, kv_heads, n_k, pv] do not "
            f"fit together: got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"The number of query heads must be a multiple of the key heads; got {query.shape[1]} and {key.shape[1]}."
        )


def _padding_mask(mask: Tensor | None, name: str, batch: int, n: int) -> Tensor | None:
    """`mask` as `[batch, n]` bool with True for valid. A bool mask is not looked into, which would wait for a GPU."""
    if mask is None:
        return None
    if mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != n:
        raise ValueError(
            f"{name} must be a padding mask [batch, n] = [{batch}, {n}]; got {tuple(mask.shape)}. A mask that differs "
            "between queries cannot be sketched: use exact attention."
        )
    if mask.is_floating_point():
        valid = valid_from_additive(mask)
        if valid is None:
            raise ValueError(
                f"A float {name} is additive: 0 for valid, {_DROPPED:g} or less for padding. Got values from "
                f"{mask.min().item():g} to {mask.max().item():g}. Pass 0/1 as bool or integers; a bias cannot be "
                "sketched."
            )
        mask = valid
    elif mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"An integer {name} holds 0 and 1; got values from {mask.min().item()} to {mask.max().item()}."
            )
        mask = mask.bool()
    return mask.expand(batch, n)


def _none_if_all(mask: Tensor | None) -> Tensor | None:
    """`mask`, or None if nothing is padding; a graph that is being compiled or captured must hold for either."""
    if mask is None or torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return mask
    return None if bool(mask.all()) else mask
