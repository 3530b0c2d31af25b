"""Other methods behind the signature of `skein_attention`, and as `attn_implementation="skein:linformer"` etc.

They are for comparison: plain PyTorch (`sketch/baselines/`), registered by `register_baselines()` and never on import.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .attention import (
    _check_shapes,
    _none_if_all,
    _padding_mask,
    _put_back,
    _take,
    _valid,
    exact_attention,
)
from .config import SkeinConfig
from .sketch.baselines import BASELINES


# As it was published: Informer samples, and averages, what stands in the padding.
IGNORES_PADDING = {"informer-unmasked": "informer"}

NAMES = (*BASELINES, *IGNORES_PADDING)


def baseline_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    config: SkeinConfig | None = None,
    *,
    method: str,
    query_mask: Tensor | None = None,
    global_mask: Tensor | None = None,
    layer: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """Bidirectional attention by another method than skein's, for comparison.

    As in `skein_attention`, a sequence is computed from its valid tokens alone, and exactly if it has at most
    `max(num_columns, min_length)` keys. Of `config`, `num_columns` is the method's size (the projected length of
    Linformer, the rows of Informer, the landmarks of Nyströmformer, the features of Performer, the keys per query of
    Longformer and BigBird), `min_length`, `seed` and `layers` mean what they say, `method="exact"` (of a layer, say)
    computes exactly, and the other fields are not looked at.

    Args:
        query: `[batch, heads, n_q, p]`, any floating dtype.
        key: `[batch, kv_heads, n_k, p]`; `kv_heads` divides `heads`.
        value: `[batch, kv_heads, n_k, pv]`.
        attention_mask: As in `skein_attention`.
        scaling: Multiplies the logits; default `p**-0.5`.
        config: The settings; default `SkeinConfig()`.
        method: One of `hf_skein.baselines.NAMES`. `"informer-unmasked"` takes padding for tokens, as Informer does.
        query_mask: As in `skein_attention`.
        global_mask: Must mark nothing: none of the methods knows global tokens but the first.
        layer: Index of the layer.
        dropout: Must be 0: none of the methods has weights that could be dropped.

    Returns:
        `[batch, heads, n_q, pv]`, in the dtype of `query`.

    Raises:
        ValueError: As in `skein_attention`; or the method does not exist, or cannot do this.
    """
    if method not in NAMES:
        raise ValueError(f"method is {method!r}; baselines are {', '.join(map(repr, NAMES))}.")
    if dropout:
        raise ValueError(
            f"{method} has no attention dropout; got {dropout}. Set it to 0 (of most configurations: "
            "attention_probs_dropout_prob=0)."
        )
    if global_mask is not None and bool(global_mask.any()):
        raise ValueError(f"{method} knows no global tokens; pass no global_mask, or use skein attention.")
    config = (SkeinConfig() if config is None else config).for_layer(layer)
    _check_shapes(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    n_q, n_k = query.shape[2], key.shape[2]
    mask = _padding_mask(attention_mask, "attention_mask", query.shape[0], n_k)
    if query_mask is None:
        query_mask = mask if n_q == n_k else None
    else:
        query_mask = _padding_mask(query_mask, "query_mask", query.shape[0], n_q)
    if config.method == "exact" or n_k <= config.exact_length:
        return exact_attention(query, key, value, _none_if_all(mask), scale, query_mask=_none_if_all(query_mask))
    if method in IGNORES_PADDING:
        method, mask, query_mask = IGNORES_PADDING[method], None, None
    sketch = functools.partial(_one_sequence, method=method, scale=scale, config=config, layer=layer)
    outputs = [
        sketch(q, k, v, _valid(mask, i), _valid(query_mask, i))
        for i, (q, k, v) in enumerate(zip(query, key, value, strict=True))
    ]
    return torch.stack(outputs) if outputs else query.new_zeros(*query.shape[:3], value.shape[-1])


def _one_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | slice | None,
    valid_query: Tensor | slice | None,
    method: str,
    scale: float,
    config: SkeinConfig,
    layer: int,
) -> Tensor:
    """`[heads, n_q, p]`, `[kv_heads, n_k, p]`, `[kv_heads, n_k, pv]` of one sequence to `[heads, n_q, pv]`."""
    n_q, dtype = query.shape[1], query.dtype
    query, key, value = _take(query, valid_query), _take(key, valid), _take(value, valid)
    if query.shape[1] == 0 or key.shape[1] == 0:
        output = query.new_zeros(*query.shape[:2], value.shape[-1])
    elif key.shape[1] <= config.exact_length:
        output = exact_attention(query[None], key[None], value[None], None, scale)[0]
    else:
        heads = torch.arange(len(query), device=query.device)
        key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
        with torch.autocast(query.device.type, enabled=False):
            if dtype in (torch.float16, torch.bfloat16):
                query, key, value = query.float(), key.float(), value.float()
            output = BASELINES[method](query, key, value, scale, config.num_columns, config.seed, layer, heads)
    return _put_back(output.to(dtype), valid_query, n_q)


def register_baselines() -> tuple[str, ...]:
    """Register every baseline with Transformers: `attn_implementation="skein:linformer"` and so on.

    Settings are those of `hf_skein.configure`; see `baseline_attention` for what they mean. What skein attention leaves
    exact (causal masks, sliding windows, cross-attention ...) stays exact under these names too.

    Returns:
        The names registered.

    Example:
        >>> hf_skein.register_baselines()
        >>> model = AutoModel.from_pretrained(name, attn_implementation="skein:nystromformer")
        >>> hf_skein.configure(model, num_columns=256, min_length=0)  # 256 landmarks, whatever the length
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from .registration import NAME, skein_attention_forward, skein_mask

    names = tuple(f"{NAME}:{method}" for method in NAMES)
    for name, method in zip(names, NAMES, strict=True):
        attend = functools.partial(baseline_attention, method=method)
        AttentionInterface.register(name, functools.partial(skein_attention_forward, attend=attend))
        AttentionMaskInterface.register(name, skein_mask)
    return names
