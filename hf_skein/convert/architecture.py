"""Longformer and BigBird in the architectures that they were made from: RoBERTa and BERT.

They differ from those in nothing but attention, so the weights carry over, most of them under the same names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import transformers
from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Target:
    """What a type of model is converted to.

    Attributes:
        name: Prefix of the target's classes.
        rename: Pattern and replacement for the names of weights.
        dropped: Pattern of the weights that the target has no place for.
        heads: The heads (`For...`) that both compute alike.
        required: Values of the configuration without which the target would compute something else.
    """

    name: str
    rename: tuple[str, str]
    dropped: str
    heads: tuple[str, ...]
    required: dict[str, bool]


_TARGETS = {
    "longformer": _Target(
        "Roberta",
        (r"^longformer\.", "roberta."),
        r"\.(query|key|value)_global\.",
        ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"),
        {},
    ),
    "big_bird": _Target(
        "Bert",
        (r"^((?:bert\.)?pooler)\.(weight|bias)$", r"\1.dense.\2"),
        r"^bert\.pooler\.",
        ("MaskedLM", "TokenClassification", "MultipleChoice"),
        {"rescale_embeddings": False, "use_bias": True, "is_decoder": False},
    ),
}
# Fields that say which architecture it was, and those of BigBird's pattern. `attention_window` keeps its meaning.
_OLD_FIELDS = (
    "model_type architectures onnx_export attention_type block_size num_random_blocks rescale_embeddings use_bias"
)


def converts(model_type: str) -> bool:
    """Whether models of this type change their architecture."""
    return model_type in _TARGETS


def to_full_attention(model: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """A Longformer as RoBERTa, or a BigBird as BERT, with the same head and the same positions.

    Where its window reaches the whole document (of a BigBird: with `attention_type="original_full"`) and no token is
    global, the result computes what the model did.

    Args:
        model: Left as it is.

    Returns:
        The new model, and notes: what changed, and what was not carried over.

    Raises:
        ValueError: The head, a field of the configuration or a weight has no counterpart.
    """
    target, name = _TARGETS[model.config.model_type], type(model).__name__
    head = name.partition("For")[2] if model.base_model is not model else ""
    if head and head not in target.heads:
        raise ValueError(
            f"{target.name} computes no head as {name} does. Heads that carry over: {', '.join(target.heads)}; or load "
            "the encoder alone with AutoModel, and convert that."
        )
    for field, value in target.required.items():
        if getattr(model.config, field) != value:
            raise ValueError(
                f"{name} has config.{field}={getattr(model.config, field)}, which {target.name} cannot represent; only "
                f"{value} carries over."
            )
    new_class = getattr(transformers, f"{target.name}For{head}" if head else f"{target.name}Model")
    fields = {key: value for key, value in model.config.to_dict().items() if key not in _OLD_FIELDS.split()}
    pooler = {} if head else {"add_pooling_layer": model.pooler is not None}
    new_model = new_class(new_class.config_class.from_dict(fields), **pooler).to(model.device, model.dtype)

    weights = {re.sub(*target.rename, key): value for key, value in model.state_dict().items()}
    places = new_model.state_dict().keys()
    dropped = [key for key in weights if key not in places and re.search(target.dropped, key)]
    if lost := sorted((weights.keys() ^ places) - set(dropped)):
        raise ValueError(f"{name} and {new_class.__name__} do not have the same weights: {', '.join(lost)}.")
    new_model.load_state_dict({key: weights[key] for key in places})
    notes = [f"{name} became {new_class.__name__}: full attention, which skein sketches, instead of a sparse pattern."]
    if dropped:
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", key) for key in dropped})
        notes.append(f"Dropped {len(dropped)} weights that {new_class.__name__} has no place for: {', '.join(kinds)}.")
    return new_model.train(model.training), notes
