"""Extend the learned absolute position table of a pretrained encoder."""

import re
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import nn


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TABLE = "position_embeddings"
# What Transformers calls the modules that give an encoder its positions, or a window of them.
_POSITION_NAME = re.compile(r"(^|_)(position|rel_|relative|rotary|rope)|pos_emb|embed_pos|^wpe$|_global$")
_WHAT_TO_DO = (
    "Supported are encoders with one learned table `position_embeddings` beside `word_embeddings`: BERT-like ones, "
    "which number tokens from 0 (BERT, DistilBERT, ELECTRA, ALBERT, ERNIE, MobileBERT, BertGeneration, RoCBert, ...), "
    "and RoBERTa-like ones, which number them from padding_idx + 1 (RoBERTa, XLM-RoBERTa, XLM-RoBERTa-XL, CamemBERT, "
    "Data2VecText, RoBERTa-PreLayerNorm, ESM with learned positions, ...). A rotary model has no table, so there is "
    "nothing to extend: use it as it is and set tokenizer.model_max_length. For any other scheme, start from a "
    "checkpoint of a supported family."
)


def extend_positions(
    model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None", max_length: int, method: str = "tile"
) -> nn.Module:
    """Extends, in place, the learned absolute position table of an encoder to documents of `max_length` tokens.

    The weight `[old_rows, hidden]` becomes a new `nn.Parameter` `[new_rows, hidden]` of the same dtype, device and
    `requires_grad`; build an optimizer after this call, not before. `new_rows` is `max_length` for a BERT-like table
    and `max_length + padding_idx + 1` for a RoBERTa-like one, whose first `padding_idx + 1` rows are reserved and are
    copied unchanged. The buffers `position_ids` and `token_type_ids` `[1, rows]`, `config.max_position_embeddings`
    (the rows) and `tokenizer.model_max_length` (`max_length`) follow. At the present length only the tokenizer is set.

    Args:
        model: The encoder, with any head.
        tokenizer: Its tokenizer, or `None`.
        max_length: Tokens of the longest document, special tokens included.
        method: `"tile"` copies the table end to end (Longformer's recipe, arXiv 2004.05150): up to the old length the
            model computes what it did before. `"interpolate"` stretches the table linearly, first and last row kept:
            neighbours stay alike, but all positions between the two move, so the model needs training afterwards.

    Returns:
        `model` itself.

    Raises:
        ValueError: If an argument is not as above, `max_length` is below the present length, the weights are on the
            meta device, or the model does not have one table, known to be BERT-like or RoBERTa-like, as its only
            source of positions. Nothing has been changed then.
    """
    _check_arguments(model, tokenizer, max_length, method)
    *wrappers, encoder, embeddings = _find_embeddings(model)
    table = embeddings.position_embeddings
    _check_table(model, encoder, table)
    reserved = _count_reserved_rows(model, embeddings)
    old_rows, old_length = table.num_embeddings, table.num_embeddings - reserved
    if max_length < old_length:
        raise ValueError(
            f"max_length={max_length} is less than the {old_length} tokens that {type(model).__name__} takes now, and "
            f"shrinking would throw weights away. Give max_length >= {old_length}; to use shorter documents, lower "
            "tokenizer.model_max_length instead."
        )
    if max_length > old_length:
        grown = _METHODS[method](table.weight.detach()[reserved:], max_length)
        weight = torch.cat([table.weight.detach()[:reserved], grown])
        table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        table.num_embeddings = len(weight)
        _grow_buffers(embeddings, len(weight))
        for module in [*wrappers, *encoder.modules()]:
            if getattr(getattr(module, "config", None), "max_position_embeddings", None) == old_rows:
                module.config.max_position_embeddings = len(weight)
    if tokenizer is not None:
        tokenizer.model_max_length = max_length
    return model


def _check_arguments(model: object, tokenizer: object, max_length: object, method: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a Transformers model (a torch.nn.Module), got {type(model).__name__}.")
    if tokenizer is not None and not hasattr(tokenizer, "model_max_length"):
        raise ValueError(
            "tokenizer must be a Transformers tokenizer, which has `model_max_length`, or None, "
            f"got {type(tokenizer).__name__}."
        )
    if not isinstance(max_length, int) or isinstance(max_length, bool):
        raise ValueError(
            f"max_length must be an int, the number of tokens of the longest document, got {max_length!r} "
            f"({type(max_length).__name__})."
        )
    if method not in (allowed := sorted(_METHODS)):
        raise ValueError(f"method must be one of {allowed}, got {method!r}.")


def _find_embeddings(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that wrap the encoder, the encoder (innermost one with a config), its embeddings module."""
    found = _position_modules(model)
    # Exactly nn.Embedding: a subclass may move the positions inside its own forward, as BART's does by 2.
    paths = [path for path, module in found.items() if _last(path) == _TABLE and type(module) is nn.Embedding]
    if len(paths) != 1:
        _refuse(model, f"it has {len(paths)} tables (nn.Embedding) named `{_TABLE}`, not one", found)
    names = paths[0].split(".")
    around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
    embeddings = around.pop()
    if not isinstance(getattr(embeddings, "word_embeddings", None), nn.Module):
        _refuse(model, f"its `{paths[0]}` does not lie beside `word_embeddings`", found)
    while around and not hasattr(getattr(around[-1], "config", None), "max_position_embeddings"):
        around.pop()
    if not around:
        _refuse(model, f"nothing around `{paths[0]}` has a config with `max_position_embeddings`", found)
    others = {path: part for path, part in _position_modules(around[-1]).items() if part is not found[paths[0]]}
    if others:
        _refuse(model, f"beside its table `{paths[0]}` it has another source of positions, or a window", others)
    return [*around, embeddings]


def _check_table(model: nn.Module, encoder: nn.Module, table: nn.Embedding) -> None:
    if table.weight.is_meta:
        raise ValueError(
            f"model: the position table of {type(model).__name__} is on the meta device and has no values. Load the "
            "weights first (from_pretrained without a meta device), then extend."
        )
    rows, stored, stated = table.num_embeddings, len(table.weight), encoder.config.max_position_embeddings
    if not rows == stored == stated:
        _refuse(
            model,
            f"its table has num_embeddings={rows}, {stored} stored rows and config.max_position_embeddings={stated}, "
            "which must agree (extend a model before anything shards or resizes it)",
            _position_modules(model),
        )


class _PositionsSeen(Exception):
    """Carries the position ids out of an embeddings module that is about to look them up."""


@torch.no_grad()
def _count_reserved_rows(model: nn.Module, embeddings: nn.Module) -> int:
    """Asks the embeddings module which rows it gives to a token, a padding token and another token."""
    table = embeddings.position_embeddings
    token = 1 if table.padding_idx == 0 else 0
    padding = token if table.padding_idx is None else table.padding_idx
    input_ids = torch.tensor([[token, padding, token]], device=embeddings.word_embeddings.weight.device)

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> NoReturn:
        # Stopping here, before normalisation and dropout, needs no eval mode and draws no random number.
        raise _PositionsSeen(args[0].flatten().tolist())

    handle = table.register_forward_pre_hook(stop)
    try:
        embeddings(input_ids=input_ids)
        positions = None
    except _PositionsSeen as seen:
        (positions,) = seen.args
    except Exception as error:
        _refuse(model, f"its embeddings module does not run on input_ids alone ({error!r})", _position_modules(model))
    finally:
        handle.remove()

    if positions == [0, 1, 2]:
        return 0
    if table.padding_idx is not None and positions == [padding + 1, padding, padding + 2]:
        return padding + 1
    reason = (
        f"its table has padding_idx={table.padding_idx} and takes tokens {input_ids[0].tolist()} for rows {positions}"
    )
    _refuse(model, reason, _position_modules(model))


def _tile(rows: torch.Tensor, length: int) -> torch.Tensor:
    """[old, hidden] -> [length, hidden]; row i is old row i mod old."""
    return rows[torch.arange(length, device=rows.device) % len(rows)]


def _interpolate(rows: torch.Tensor, length: int) -> torch.Tensor:
    """[old, hidden] -> [length, hidden]; row i is the old table at i * (old - 1) / (length - 1)."""
    # In integers, because a rounded place would miss the last row, which is to be kept exactly.
    place, step = torch.arange(length, device=rows.device) * (len(rows) - 1), length - 1
    below = place // step
    above = (below + 1).clamp(max=len(rows) - 1)
    values = rows.to(torch.promote_types(rows.dtype, torch.float32))
    fraction = (place % step).to(values.dtype) / step
    return torch.lerp(values[below], values[above], fraction[:, None]).to(rows.dtype)


_METHODS = {"tile": _tile, "interpolate": _interpolate}


def _grow_buffers(embeddings: nn.Module, rows: int) -> None:
    # Assigning to a registered buffer keeps its persistence.
    for name, buffer in list(embeddings.named_buffers(recurse=False)):
        if name == "position_ids":
            embeddings.position_ids = torch.arange(rows, dtype=buffer.dtype, device=buffer.device)[None]
        elif name == "token_type_ids":
            embeddings.token_type_ids = nn.functional.pad(buffer, (0, rows - buffer.shape[-1]))


def _position_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if _POSITION_NAME.search(_last(path))}


def _last(path: str) -> str:
    return path.rpartition(".")[-1]


def _refuse(model: nn.Module, reason: str, found: dict[str, nn.Module]) -> NoReturn:
    # One module per name: a relative bias or a window repeats in every layer.
    kinds = {_last(path): f"`{path}` ({type(module).__name__})" for path, module in found.items()}
    listed = ", ".join(kinds.values()) or "nothing"
    raise ValueError(
        f"model: cannot extend the positions of {type(model).__name__}: {reason}. Found, by name: {listed}. "
        f"{_WHAT_TO_DO}"
    )
