"""How Transformers reaches skein: the attention function, the mask function, and the check at load.

Principle: what the sketch cannot represent is computed as `attn_implementation="sdpa"` would compute it (or, where sdpa
cannot either, by the model's own eager function), logged once with the reason; `strict` raises instead.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, prepare_padding_mask, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging

from .attention import _none_if_all, skein_attention, valid_from_additive
from .config import SkeinConfig, with_window
from .local import band_mask, local_attention


NAME = "skein"

# Older releases of Transformers would swallow it.
_SDPA_TAKES_POSITION_BIAS = "position_bias" in inspect.signature(sdpa_attention_forward).parameters

_LONGFORMER = "transformers.models.longformer.modeling_longformer"

logger = logging.get_logger(__name__)


# --- the two registered functions ---


def skein_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    attend: Callable[..., Tensor] | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What Transformers calls for `attn_implementation="skein"`.

    Args:
        module: The attention module; its `config.skein`, `layer_idx`, `is_causal`, `is_decoder` are read if there.
        query: `[batch, heads, n_q, p]`.
        key: `[batch, kv_heads, n_k, p]`.
        value: `[batch, kv_heads, n_k, pv]`.
        attention_mask: What `skein_mask` made: None, `[batch, n_k]` (padding), `[batch, n, 2w + 1]` (a band), or a 4D
            mask.
        dropout: Probability of dropping an attention weight.
        scaling: Multiplies the logits.
        is_causal: Overrides `module.is_causal`.
        attend: The attention itself, if not `skein_attention`: see `baselines.py`.
        **kwargs: What the model passes besides; `global_attention_mask` `[batch, n]`, if a caller gave it to the model,
            marks global tokens (see `skein_attention`).

    Returns:
        `[batch, n_q, heads, pv]`, and the attention weights if they were asked for, else None.
    """
    layer = getattr(module, "layer_idx", None)
    config = _skein_config(getattr(module, "config", None)).for_layer(layer)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # As in sdpa, the flag only speaks where no mask does; bidirectional attention always gets one from `skein_mask`.
    is_causal = is_causal and attention_mask is None and query.shape[2] > 1
    if (
        attention_mask is not None
        and attention_mask.ndim == 4
        and attention_mask.shape[1] == attention_mask.shape[2] == 1
    ):
        attention_mask = _padding_from_4d(attention_mask)

    if config.method != "exact" and (reason := _why_exact(module, query, key, attention_mask, is_causal, kwargs)):
        if config.strict:
            raise ValueError(
                f"{type(module).__name__} (layer {layer}) asks for what skein attention cannot represent: {reason}. "
                "config.skein has strict=True; set strict=False to compute such layers exactly, or say so for this "
                'layer with hf_skein.configure(model, layers={index: {"method": "exact"}}).'
            )
        _log_exact(type(module).__name__, reason)
    elif config.method != "exact":
        global_mask = kwargs.get("global_attention_mask")
        if global_mask is not None:
            global_mask = global_mask.flatten(0, -2)  # of multiple choices [batch, choices, n]
        output = (attend or skein_attention)(
            query,
            key,
            value,
            attention_mask,
            scaling,
            config,
            global_mask=global_mask,
            layer=layer or 0,
            dropout=dropout,
        )
        return output.transpose(1, 2).contiguous(), None
    return _exact(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)


def skein_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs,
) -> Tensor | None:
    """What Transformers calls to build masks for `attn_implementation="skein"`; never n x n where skein attends.

    Returns:
        Plain bidirectional attention: the padding mask `[batch, kv_length]`, all True if nothing is padding (None would
        leave a module that does not know `is_causal` in doubt). A bidirectional sliding window: the band
        `[batch, n, 2w + 1]`, see `local.band_mask`. Anything else: what sdpa gets.
    """
    device = kwargs["device"] if "device" in kwargs else kwargs["cache_position"].device
    if getattr(kwargs.get("config"), "model_type", None) == "longformer":
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        return importlib.import_module(".longformer", __package__).padding_mask(
            batch_size, kv_length, padding, kwargs["dtype"], device
        )
    # Only the makers of bidirectional masks pass this argument.
    is_bidirectional = kwargs.get("allow_is_bidirectional_skip", False)
    is_padding = attention_mask is None or attention_mask.ndim == 2
    if is_bidirectional and is_padding and not use_vmap and kv_offset == 0:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None:
            padding = padding[:, :kv_length]
        if mask_function is bidirectional_mask_function or (local_size is not None and kv_length <= local_size):
            if padding is None:
                padding = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
            return padding
        if local_size is not None and _query_length(kwargs) == kv_length:
            return band_mask(mask_function, batch_size, kv_length, local_size, padding, device)
    if not _knows_is_causal(type(kwargs.get("config"))):
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **kwargs,
    )


@functools.cache
def _knows_is_causal(config_class: type) -> bool:
    """Whether a model's attention modules say by `is_causal` what no mask means: those made for sdpa do."""
    model_class = MODEL_MAPPING.get(config_class, None)
    model_classes = model_class if isinstance(model_class, tuple) else (model_class,)
    return all(getattr(c, "_supports_sdpa", False) for c in model_classes)


def _query_length(kwargs: dict) -> int:
    """Transformers passes `q_length`, releases up to 5.4 the positions themselves."""
    return kwargs["q_length"] if "q_length" in kwargs else len(kwargs["cache_position"])


# --- what cannot be sketched ---


def _why_exact(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, kwargs: dict
) -> str | None:
    """The reason why this call is computed exactly, or None if it can be sketched."""
    if kwargs.get("output_attentions"):
        return "output_attentions=True needs the n x n attention weights"
    if kwargs.get("position_bias") is not None:
        return "a position bias is added to the logits"
    if kwargs.get("softcap") is not None:
        return "the logits are soft-capped"
    if kwargs.get("s_aux") is not None:
        return "attention sinks are added to the row sums"
    if kwargs.get("cache") is not None:
        return "a paged key-value cache"
    if (mask is not None and mask.ndim == 3) or kwargs.get("sliding_window") is not None:
        return "a sliding window"
    if mask is not None and mask.ndim == 4:
        return "a 4D attention mask (causal, packed or the caller's own)"
    if getattr(module, "is_decoder", False) or getattr(getattr(module, "config", None), "is_decoder", False):
        return "a decoder"
    if is_causal:
        return "a causal mask"
    if _may_be_cross_attention(type(module)) and not hasattr(module, "is_decoder"):
        return "a module that serves cross-attention too"
    if query.shape[2] != key.shape[2]:
        return "query and key lengths differ (cross-attention, a key-value cache or prefix tuning)"
    if _is_packed(kwargs):
        return "packed documents"
    return None


@functools.cache
def _may_be_cross_attention(module_class: type) -> bool:
    """Whether an attention module takes keys from elsewhere; then equal lengths do not mean self-attention."""
    names = inspect.signature(module_class.forward).parameters
    return bool({"encoder_hidden_states", "key_value_states", "cross_attention_states"} & set(names))


def _is_packed(kwargs: dict) -> bool:
    """Whether a row holds several documents: their boundaries are given, or the positions restart."""
    if kwargs.get("cu_seq_lens_q") is not None:
        return True
    position_ids = kwargs.get("position_ids")
    if position_ids is None or position_ids.ndim != 2:
        return False
    # A document steps from the first position to the next; padding repeats one position and never does.
    first = position_ids[:, :1]
    starts = (position_ids[:, :-1] == first) & (position_ids[:, 1:] == first + 1)
    return bool((starts.sum(-1) > 1).any())


@functools.cache
def _log_exact(class_name: str, reason: str) -> None:
    logger.warning(f"skein: {class_name} runs exact attention, because of {reason}.")


# --- exact attention ---


def _exact(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    kwargs: dict,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention as the model would compute it without skein."""
    needs_eager = (
        kwargs.get("output_attentions")
        or kwargs.get("softcap") is not None
        or kwargs.get("s_aux") is not None
        or not _knows_is_causal(type(getattr(module, "config", None)))  # its eager function is all the class has
        or (kwargs.get("position_bias") is not None and not _SDPA_TAKES_POSITION_BIAS)
    )
    if mask is not None and mask.ndim == 3:
        if kwargs.get("global_attention_mask") is not None:
            raise ValueError(
                f"{type(module).__name__} has a sliding window, which knows no global tokens: global_attention_mask "
                "would be ignored. Call the model without it."
            )
        if not needs_eager:
            return local_attention(query, key, value, mask, scaling, dropout).transpose(1, 2).contiguous(), None
        mask = _dense(mask)
    elif mask is not None and mask.ndim == 2:
        mask = _none_if_all(mask)
        mask = None if mask is None else mask[:, None, None, :].expand(-1, 1, query.shape[2], -1)
    if not needs_eager:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(
            f"{type(module).__name__} needs its own eager attention here, and {type(module).__module__} has none. "
            'Load the model with attn_implementation="eager".'
        )
    if mask is None and is_causal:
        n_q, n_k = query.shape[2], key.shape[2]
        mask = torch.ones(n_q, n_k, dtype=torch.bool, device=query.device).tril(n_k - n_q)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _dense(band: Tensor) -> Tensor:
    """`[batch, 1, n, n]` mask of a band."""
    batch, n, width = band.shape
    offset = torch.arange(n, device=band.device) - torch.arange(n, device=band.device)[:, None] + width // 2
    inside = (offset >= 0) & (offset < width)
    return (band.gather(2, offset.clamp(0, width - 1).expand(batch, n, n)) & inside)[:, None]


def _padding_from_4d(mask: Tensor) -> Tensor:
    """`[batch, n_k]` of a `[batch, 1, 1, n_k]` mask that is the same for every query, if it means padding."""
    row = mask[:, 0, 0]
    if row.dtype == torch.bool:
        return row
    valid = valid_from_additive(row)
    return mask if valid is None else valid


# --- configuration ---


def _skein_config(config: PretrainedConfig | None) -> SkeinConfig:
    """The `SkeinConfig` of a model's configuration, read again only when it changed.

    A `SkeinConfig` that was assigned becomes the plain JSON that `save_pretrained` can write. Where it does not say
    `num_columns`, Longformer's `attention_window` does: so many keys each query attends to exactly.
    """
    values = getattr(config, "skein", None)
    if isinstance(values, SkeinConfig):
        config.skein = values = values.to_dict()
    if values is None:
        values = {}
    if isinstance(values, Mapping):
        values = with_window(values, getattr(config, "attention_window", None))
    if not values:
        return SkeinConfig()
    if torch.compiler.is_compiling():  # a graph reads the fields and is guarded by them
        return SkeinConfig.from_dict(values)
    try:
        text = json.dumps(values, sort_keys=True)
    except TypeError as error:
        raise ValueError(
            f"config.skein is {values!r}, which is not plain JSON ({error}). Set it with "
            "hf_skein.configure(model, ...), or assign SkeinConfig(...).to_dict()."
        ) from None
    return _parse(text)


@functools.lru_cache(maxsize=128)
def _parse(text: str) -> SkeinConfig:
    return SkeinConfig.from_dict(json.loads(text))


def configure(model_or_config: PreTrainedModel | PretrainedConfig, **fields) -> SkeinConfig:
    """Set skein's settings of a model; fields that are not given keep their value.

    They are plain JSON in `config.skein`, which `save_pretrained` and `from_pretrained` carry along.

    Args:
        model_or_config: A model or its configuration; changed in place, with the configurations nested in it.
        **fields: Fields of `SkeinConfig`.

    Returns:
        The resulting configuration.

    Raises:
        ValueError: A field does not exist or has a value that is not allowed. Nothing is changed.

    Example:
        >>> hf_skein.configure(model, num_columns=256, layers={0: {"method": "exact"}})

        Before the model is loaded (`from_pretrained` takes no `skein=...`):

        >>> config = AutoConfig.from_pretrained(name)
        >>> hf_skein.configure(config, num_columns=256)
        >>> model = AutoModel.from_pretrained(name, config=config, attn_implementation="skein")
    """
    config = getattr(model_or_config, "config", model_or_config)
    if not isinstance(config, PretrainedConfig):
        raise ValueError(f"configure expects a model or a configuration of Transformers; got {type(config).__name__}.")
    unknown = sorted(set(fields) - set(SkeinConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"SkeinConfig has no field {', '.join(unknown)}; fields are {', '.join(SkeinConfig.__dataclass_fields__)}."
        )
    configs = _all_configs(model_or_config, config)
    results = [_changed(one, fields) for one in configs]
    for one, result in zip(configs, results, strict=True):
        one.skein = result.to_dict()
    return results[0]


def _changed(config: PretrainedConfig, fields: Mapping[str, Any]) -> SkeinConfig:
    """The settings of a configuration with some fields changed."""
    before = _skein_config(config).to_dict()
    window = getattr(config, "attention_window", None)
    of_window = with_window({}, window).get("layers", {})  # if it differs between layers
    if of_window and all("num_columns" in before["layers"].get(layer, {}) for layer in of_window):  # it is in force
        if "num_columns" in fields:
            for layer, overrides in of_window.items():
                if before["layers"][layer]["num_columns"] == overrides["num_columns"]:
                    del before["layers"][layer]["num_columns"]
            before["layers"] = {layer: overrides for layer, overrides in before["layers"].items() if overrides}
        elif isinstance(layers := fields.get("layers"), Mapping) and all(
            isinstance(x, Mapping) for x in layers.values()
        ):
            fields = {**fields, **with_window({"layers": layers}, window)}
    return SkeinConfig.from_dict({**before, **fields})


def _all_configs(model_or_config, config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configuration, those nested in it, and those that modules hold (T5 gives encoder and decoder a copy)."""
    found = [config]
    if isinstance(model_or_config, nn.Module):
        found += [
            m.config for m in model_or_config.modules() if isinstance(getattr(m, "config", None), PretrainedConfig)
        ]
    for one in found:  # grows while it is walked
        found += [c for name in one.sub_configs if (c := getattr(one, name, None)) is not None]
    return found


# --- classes that bypass the registry ---

_ASKS = re.compile(r"get_interface\(|ALL_ATTENTION_FUNCTIONS(\[|\.get\()")


def own_attention_classes(model_class: type) -> list[str]:
    """Attention modules in a model's source file that attend by themselves instead of asking the registry."""
    module = sys.modules.get(model_class.__module__)
    found = []
    for name, member in vars(module).items() if module is not None else ():
        if inspect.isclass(member) and issubclass(member, nn.Module) and member.__module__ == module.__name__:
            source = _source(member)
            computes = "softmax(" in source or "scaled_dot_product_attention(" in source
            if "Attention" in name and computes and not _ASKS.search(source):
                found.append(name)
    return found


def calls_registry(module_class: type) -> bool:
    """Whether the file that a module's class stands in asks the attention registry."""
    module = sys.modules.get(module_class.__module__)
    return module is not None and _ASKS.search(_source(module)) is not None


def _is_longformer(module_class: type) -> bool:
    return any(base.__module__ == _LONGFORMER for base in module_class.__mro__)


def _is_ours(name: str | None) -> bool:
    """Whether `name` is skein or one of its baselines (`skein:linformer` ...)."""
    return isinstance(name, str) and name.partition(":")[0] == NAME


def _runs_skein(module_class: type) -> bool:
    return calls_registry(module_class) or _is_longformer(module_class)


@functools.cache
def _source(thing) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # defined interactively: there is no source to read
        return ""


@functools.cache
def _check_class(model_class: type, name: str = NAME) -> None:
    """Refuse a class that has an attention of its own or claims to support no other; warn if it also asks."""
    if _is_longformer(model_class) and name == NAME:
        return
    own = own_attention_classes(model_class)
    if not calls_registry(model_class) and (own or not model_class._supports_sdpa):
        raise _refusal(model_class, name)
    if own:
        logger.warning(
            f"skein: parts of {model_class.__name__} bypass Transformers' attention registry and run their own "
            f"attention where the model uses them: {', '.join(own)}."
        )


def _check_parts(model: PreTrainedModel, name: str, is_configured: bool) -> None:
    """Refuse a model whose file leaves attention to other models, if none of them asks the registry.

    They may be of another library, or (looked at if `is_configured`) may not have been told to ask for `name`.
    """
    runs = _runs_skein if name == NAME else calls_registry
    if runs(type(model)):
        return
    parts = [part for part in model.modules() if runs(type(part))]
    if is_configured:
        parts = [p for p in parts if getattr(getattr(p, "config", None), "_attn_implementation", None) == name]
    if not parts:
        raise _refusal(type(model), name)


def _refusal(model_class: type, name: str) -> ValueError:
    own = own_attention_classes(model_class)
    own_text = f" (it computes {', '.join(own)} itself)" if own else ""
    return ValueError(
        f"{model_class.__name__} does not support attn_implementation={name!r}: it never asks Transformers' "
        f"attention registry{own_text} and would silently run another attention. Load it without attn_implementation, "
        "or convert the checkpoint to an architecture that does (BERT, RoBERTa, ...). Of a model made of several, name "
        f'the parts that do, e.g. attn_implementation={{"text_config": "{name}"}}.'
    )


def _check_at_load() -> None:
    """Have `from_pretrained`, `from_config` and `set_attn_implementation` refuse classes that bypass the registry.

    The registries are not told which class asks, so this is the one place where methods of Transformers are wrapped,
    for our names only: the check that every model runs on the name of its attention, before it has any parts unless the
    name is set later, and the end of every model's construction (where a Longformer is told to sketch, too).
    """
    original_check, original_post_init = PreTrainedModel.get_correct_attn_implementation, PreTrainedModel.post_init

    @functools.wraps(original_check)
    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        if _is_ours(requested_attention):
            if requested_attention not in AttentionInterface._global_mapping:
                raise ValueError(
                    f"attn_implementation={requested_attention!r} is not registered. Call "
                    "hf_skein.register_baselines() first; it returns the names that there are."
                )
            _check_class(type(self), requested_attention)
            _skein_config(self.config)
            if not is_init_check:
                _check_parts(self, requested_attention, is_configured=False)
        return original_check(self, requested_attention, is_init_check)

    @functools.wraps(original_post_init)
    def post_init(self):
        name = self.config._attn_implementation
        if _is_ours(name):
            _check_parts(self, name, is_configured=True)
            if _is_longformer(type(self)):
                importlib.import_module(".longformer", __package__).attach(self)
        original_post_init(self)

    get_correct_attn_implementation.checks_skein = True
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation
    PreTrainedModel.post_init = post_init


def register() -> None:
    """Register skein with both interfaces of Transformers.

    Raises:
        ValueError: Somebody else has registered the name.
    """
    for interface, function in ((AttentionInterface, skein_attention_forward), (AttentionMaskInterface, skein_mask)):
        present = interface._global_mapping.get(NAME)
        if present is not None and present.__module__ != function.__module__:
            raise ValueError(
                f"{interface.__name__} already has an entry {NAME!r} ({present.__module__}.{present.__qualname__}). "
                "Import hf_skein before whatever registers it, or do without one of the two."
            )
        interface.register(NAME, function)
    if not hasattr(PreTrainedModel.get_correct_attn_implementation, "checks_skein"):
        _check_at_load()


register()
