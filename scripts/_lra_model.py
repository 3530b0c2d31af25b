"""The classifier of Long Range Arena, and the attention methods that are compared in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from _lra_data import Task
from torch import Tensor, nn
from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormModel
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_skein


hf_skein.register_baselines()


@dataclass(frozen=True)
class Method:
    """A row of the tables: an attention implementation with its settings.

    Attributes:
        title: As printed.
        attention: What Transformers is given as `attn_implementation`.
        settings: Fields of `SkeinConfig`.
        attention_dropout: Only exact attention has it in the paper's code; without it (a row of its own) it is 0.
        draws_anew: Whether its random numbers are others in every step; else they are those of the run, as weights are.
    """

    title: str
    attention: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    attention_dropout: float = 0.0
    draws_anew: bool = False


def _skeinformer(title: str, **ablation: Any) -> Method:
    # 256 columns and pilots, as in the paper's code. min_length=0: the sketch is what is compared, at any length.
    settings = {"method": "skeinformer", "num_columns": 256, "min_length": 0, **ablation}
    return Method(title, "skein", settings, draws_anew=True)


def _baseline(title: str, name: str, size: int = 128, draws_anew: bool = False) -> Method:
    # The size in the paper's code.
    return Method(title, f"skein:{name}", {"num_columns": size, "min_length": 0}, draws_anew=draws_anew)


METHODS = {
    "standard": Method("Standard", "sdpa", attention_dropout=0.1),
    "standard-no-dropout": Method("Standard, no dropout", "sdpa"),
    "vmean": Method("V-Mean", "skein", {"method": "vmean", "num_columns": 1, "min_length": 0}),
    "linformer": _baseline("Linformer", "linformer"),
    "linformer-jl": _baseline("Linformer, unreduced JL", "linformer-jl"),
    "informer-unmasked": _baseline("Informer", "informer-unmasked", draws_anew=True),
    "informer": _baseline("Informer, padding mask", "informer", draws_anew=True),
    "nystromformer": _baseline("Nyströmformer", "nystromformer"),
    "performer": _baseline("Performer", "performer"),
    "bigbird": _baseline("BigBird", "bigbird", 512),  # 8 blocks of 64 keys
    "skeinformer": _skeinformer("Skeinformer"),
    "skeinformer-uniform": _skeinformer("- uniform columns", column_sampling="uniform"),
    "skeinformer-no-normalization": _skeinformer("- no row normalization", row_normalization="none"),
    "skeinformer-simple-normalization": _skeinformer("- simple row normalization", row_normalization="simple"),
    "skeinformer-no-reutilization": _skeinformer("- no pilot reutilization", pilot_reutilization=False),
    "adaptive": Method("adaptive (ours)", "skein", {"min_length": 0}),
}


class Classifier(nn.Module):
    """Two pre-norm layers, width 64, feed-forward 128, two heads; the mean over valid tokens; one hidden layer of 128.

    Args:
        task: Says the vocabulary, the longest sequence, the number of labels, and of texts per example: one, or two
            that are encoded by the same weights and meet in the head as `[u, v, u * v, u - v]`.
        method: The attention.
        seed: Of the random numbers of a method that keeps them.
    """

    def __init__(self, task: Task, method: Method, seed: int = 0) -> None:
        super().__init__()
        self.method = method
        config = RobertaPreLayerNormConfig(
            vocab_size=task.vocabulary,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=task.max_length + 1,  # positions count from padding_idx + 1
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            type_vocab_size=1,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=method.attention_dropout,
            initializer_range=(3 * 64) ** -0.5,  # the deviation of PyTorch's own start of a linear layer of width 64
        )
        if method.attention.startswith("skein"):
            hf_skein.configure(config, **method.settings, seed=seed)
        config._attn_implementation = method.attention
        self.encoder = RobertaPreLayerNormModel(config, add_pooling_layer=False)
        width = config.hidden_size * (1 if task.texts == 1 else 4)
        self.head = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, task.labels))

    def reseed(self, seed: int) -> None:
        """Makes a method that draws anew draw other random numbers from now on."""
        if self.method.draws_anew:
            hf_skein.configure(self.encoder, seed=seed % 2**32)

    def encode(self, input_ids: Tensor) -> Tensor:
        """Mean final hidden state over tokens other than padding: `[batch, n]` ids to `[batch, 64]`."""
        mask = (input_ids != 0).long()
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(
        self, input_ids: Tensor, input_ids_2: Tensor | None = None, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits `[batch, labels]`, and the cross-entropy if there are labels.

        Args:
            input_ids: `[batch, n]`, 0 is padding.
            input_ids_2: `[batch, m]`, of the second text, if examples have two.
            labels: `[batch]`.
        """
        features = self.encode(input_ids)
        if input_ids_2 is not None:
            other = self.encode(input_ids_2)
            features = torch.cat([features, other, features * other, features - other], -1)
        logits = self.head(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
