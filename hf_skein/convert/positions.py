"""Extend the positions of a pretrained encoder: a learned absolute table, or the limit of a rotary model."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import nn


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TABLE = "position_embeddings"
# What Transformers calls the modules that give an encoder its positions, or a window of them.
_POSITION_NAME = re.compile(r"(^|_)(position|rel_|relative|rotary|rope)|pos_emb|embed_pos|^wpe$|_global$")
_ROTARY_NAME = re.compile(r"rotary|rope")
_WHAT_TO_DO = (
    "Supported are encoders with one learned table `position_embeddings` beside `word_embeddings`: BERT-like ones, "
    "which number tokens from 0 (BERT, DistilBERT, ELECTRA, ALBERT, ERNIE, MobileBERT, BertGeneration, RoCBert, ...), "
    "and RoBERTa-like ones, which number them from padding_idx + 1 (RoBERTa, XLM-RoBERTa, XLM-RoBERTa-XL, CamemBERT, "
    "Data2VecText, RoBERTa-PreLayerNorm, ESM with learned positions, ...); and BART and mBART, whose tables "
    "`embed_positions` have an `offset`. A rotary model has no table, so there is nothing to extend: "
    "hf_skein.convert.convert_checkpoint sets its limit. For any other scheme, start from a checkpoint of a supported "
    "family."
)


def extend_positions(
    model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None", max_length: int, method: str = "tile"
) -> nn.Module:
    """Extends, in place, the learned absolute position table of an encoder to documents of `max_length` tokens.

    The weight `[old_rows, hidden]` becomes a new `nn.Parameter` `[new_rows, hidden]` of the same dtype, device and
    `requires_grad`; build an optimizer after this call, not before. `new_rows` is `max_length` for a BERT-like table
    and `max_length + padding_idx + 1` for a RoBERTa-like one, whose first `padding_idx + 1` rows are reserved and are
    copied unchanged; so are the first two of BART's tables, the encoder's and the decoder's. The buffers `position_ids`
    and `token_type_ids` `[1, rows]`, `config.max_position_embeddings` (the rows; BART does not count the reserved ones)
    and `tokenizer.model_max_length` (`max_length`) follow. At the present length only the tokenizer is set.

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
    tables = _shifted_tables(model) or [_only_table(model)]
    old_length = tables[0].length
    if max_length < old_length:
        raise ValueError(
            f"max_length={max_length} is less than the {old_length} tokens that {type(model).__name__} takes now, and "
            f"shrinking would throw weights away. Give max_length >= {old_length}; to use shorter documents, lower "
            "tokenizer.model_max_length instead."
        )
    if max_length > old_length:
        for table in tables:
            _grow(table, max_length, method)
    if tokenizer is not None:
        tokenizer.model_max_length = max_length
    return model


def position_limit(model: nn.Module) -> int:
    """Tokens of the longest document that the model's position table, or its rotary limit, admits.

    Raises:
        ValueError: The model has neither; as in `extend_positions`.
    """
    if is_rotary(model):
        return model.config.max_position_embeddings
    return (_shifted_tables(model) or [_only_table(model)])[0].length


def is_rotary(model: nn.Module) -> bool:
    """Whether a model has rotary positions, a limit in its config, and no table of positions."""
    names = {_last(path) for path in _position_modules(model)}
    has_limit = hasattr(getattr(model, "config", None), "max_position_embeddings")
    return has_limit and bool(names) and all(_ROTARY_NAME.search(name) for name in names)


def extend_rotary(
    model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None", max_length: int, interpolate: bool
) -> nn.Module:
    """Sets, in place, the limit of a rotary model and how its angles grow; it has no table.

    `config.max_position_embeddings` and `tokenizer.model_max_length` become `max_length`. What the model has derived
    from its config stays: save it and load it again.

    Args:
        model: The encoder, with any head.
        tokenizer: Its tokenizer, or `None`.
        max_length: Tokens of the longest document, special tokens included.
        interpolate: Squeeze positions into the trained range (`rope_type="linear"`, of the layers with full attention;
            windows do not grow), so the model needs training afterwards. Otherwise angles go on as they are: up to the
            old length nothing changes, and beyond it are angles that the model has never seen.

    Returns:
        `model` itself.

    Raises:
        ValueError: If `max_length` is below the present limit, or the angles cannot be or already are scaled. Nothing
            has been changed then.
    """
    old_length = model.config.max_position_embeddings
    _check_arguments(model, tokenizer, max_length, "interpolate")
    if max_length < old_length:
        raise ValueError(
            f"max_length={max_length} is less than the {old_length} tokens that {type(model).__name__} takes now. Give "
            f"max_length >= {old_length}; to use shorter documents, lower tokenizer.model_max_length instead."
        )
    if interpolate and max_length > old_length:
        parameters = getattr(model.config, "rope_parameters", None) or {}
        full = parameters.get("full_attention", parameters)
        if full.get("rope_type") != "default":
            raise ValueError(
                f"The angles of {type(model).__name__} cannot be interpolated: config.rope_parameters is "
                f"{parameters or None}, and only rope_type='default' can be scaled. Leave `positions` out to keep them."
            )
        full.update(rope_type="linear", factor=max_length / old_length)
    for module in model.modules():
        if getattr(getattr(module, "config", None), "max_position_embeddings", None) == old_length:
            module.config.max_position_embeddings = max_length
    if tokenizer is not None:
        tokenizer.model_max_length = max_length
    return model


@dataclass
class _Table:
    """A position table and what says how long it is.

    Attributes:
        embedding: `[reserved + length, hidden]`.
        reserved: Rows that no token of a document uses, the first ones.
        stated: `max_position_embeddings` of the configs, which counts the reserved rows or does not.
        owners: Modules whose config states it.
        embeddings: The module whose buffers are as long as the table, if any.
    """

    embedding: nn.Embedding
    reserved: int
    stated: int
    owners: list[nn.Module]
    embeddings: nn.Module | None = None

    @property
    def length(self) -> int:
        return self.embedding.num_embeddings - self.reserved


def _grow(table: _Table, length: int, method: str) -> None:
    embedding, old, stated = table.embedding, table.embedding.weight, table.stated
    added = length - table.length
    rows = old.detach()
    weight = torch.cat([rows[: table.reserved], _METHODS[method](rows[table.reserved :], length)])
    embedding.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    embedding.num_embeddings = len(weight)
    if table.embeddings is not None:
        _grow_buffers(table.embeddings, len(weight))
    for module in table.owners:
        if getattr(getattr(module, "config", None), "max_position_embeddings", None) == stated:
            module.config.max_position_embeddings = stated + added


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


def _shifted_tables(model: nn.Module) -> list[_Table]:
    """The tables of BART and its like, whose own forward adds an offset to the position; none of any other model."""
    found = _position_modules(model)
    shifted = {
        path: module
        for path, module in found.items()
        if _last(path) == "embed_positions"
        and isinstance(module, nn.Embedding)
        and isinstance(getattr(module, "offset", None), int)
    }
    if not shifted:
        return []
    if others := {path: module for path, module in found.items() if path not in shifted}:
        _refuse(model, "beside its tables `embed_positions` it has another source of positions, or a window", others)
    stated = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    tables = [_Table(table, table.offset, stated, list(model.modules())) for table in shifted.values()]
    for table in tables:
        _check_values(model, table.embedding)
        if table.length != stated or not _adds_its_offset(table.embedding):
            _refuse(
                model,
                f"a table has {table.embedding.num_embeddings} rows and offset {table.reserved}, which does not fit "
                f"config.max_position_embeddings={stated}",
                shifted,
            )
    return tables


@torch.no_grad()
def _adds_its_offset(table: nn.Embedding) -> bool:
    """Whether the first tokens of a document get the rows from `offset` on."""
    rows = table(torch.zeros(1, 3, dtype=torch.long, device=table.weight.device)).reshape(3, -1)
    return torch.equal(rows, table.weight[table.offset : table.offset + 3])


def _only_table(model: nn.Module) -> _Table:
    """The one learned table of a BERT-like or RoBERTa-like encoder."""
    *wrappers, encoder, embeddings = _find_embeddings(model)
    table = embeddings.position_embeddings
    _check_table(model, encoder, table)
    reserved = _count_reserved_rows(model, embeddings)
    return _Table(table, reserved, table.num_embeddings, [*wrappers, *encoder.modules()], embeddings)


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
    _check_values(model, table)
    rows, stored, stated = table.num_embeddings, len(table.weight), encoder.config.max_position_embeddings
    if not rows == stored == stated:
        _refuse(
            model,
            f"its table has num_embeddings={rows}, {stored} stored rows and config.max_position_embeddings={stated}, "
            "which must agree (extend a model before anything shards or resizes it)",
            _position_modules(model),
        )


def _check_values(model: nn.Module, table: nn.Embedding) -> None:
    if table.weight.is_meta:
        raise ValueError(
            f"model: the position table of {type(model).__name__} is on the meta device and has no values. Load the "
            "weights first (from_pretrained without a meta device), then extend."
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
