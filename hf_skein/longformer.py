"""Longformer with `attn_implementation="skein"`. Its classes never ask the attention registry, so a model is told.

The sketch stands in place of the sliding window. Tokens of `global_attention_mask` are columns of everyone, and their
own rows are exact, through the `*_global` projections that Longformer keeps for them. Only the modules of the one model
that is loaded with skein change their class; parameters and `state_dict` keys stay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.longformer import modeling_longformer

from .attention import exact_attention, skein_attention
from .registration import _skein_config


class LongformerSelfAttention(modeling_longformer.LongformerSelfAttention):
    """The same module (its name too, which `device_map` goes by) with sketched attention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor]:
        """Arguments as in Longformer's own, `hidden_states` `[batch, n, hidden]`, masks `[batch, n]`.

        Raises:
            ValueError: `output_attentions`: neither the window's weights nor n x n ones exist.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions=True: a sketch has no attention weights, and Longformer's own are those of a "
                "window. Load the model without attn_implementation to get them."
            )
        config = _skein_config(self.config)
        dropout = self.dropout if self.training else 0.0
        output = skein_attention(
            *(self._heads(project(hidden_states)) for project in (self.query, self.key, self.value)),
            ~is_index_masked,
            config=config,
            global_mask=is_index_global_attn,
            layer=self.layer_id,
            dropout=dropout,
        )
        output = output.transpose(1, 2).flatten(2)
        if is_global_attn:
            output = self._overwrite_global_rows(output, hidden_states, ~is_index_masked, is_index_global_attn, dropout)
        return (output,)

    def _heads(self, x: Tensor) -> Tensor:
        """`[batch, n, hidden]` to `[batch, heads, n, p]`."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _overwrite_global_rows(
        self, output: Tensor, hidden_states: Tensor, valid: Tensor, is_global: Tensor, dropout: float
    ) -> Tensor:
        """Rows of global tokens, by exact attention over the `*_global` projections of all valid tokens."""
        row, place = is_global.nonzero(as_tuple=True)
        slot = is_global.cumsum(1)[row, place] - 1
        tokens = hidden_states.new_zeros(len(is_global), int(slot.max()) + 1, hidden_states.shape[-1])
        tokens = tokens.index_put((row, slot), hidden_states[row, place])
        query, key, value = self.query_global(tokens), self.key_global(hidden_states), self.value_global(hidden_states)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        exact = exact_attention(query, key, value, valid, self.head_dim**-0.5, dropout).transpose(1, 2).flatten(2)
        return output.index_put((row, place), exact[row, slot])


def _no_padding(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, pad_token_id):
    """In place of `LongformerModel._pad_to_window_size`: there is no window to pad to."""
    return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds


def attach(model: PreTrainedModel) -> None:
    """Have every Longformer in `model` sketch its attention; again is no error."""
    for module in model.modules():
        if isinstance(module, modeling_longformer.LongformerSelfAttention):
            module.__class__ = LongformerSelfAttention
        elif isinstance(module, modeling_longformer.LongformerModel):
            module._pad_to_window_size = _no_padding


def padding_mask(batch: int, n: int, padding: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The additive mask that `LongformerModel` takes apart again: `[batch, 1, 1, n]`, 0 for valid tokens."""
    mask = torch.zeros(batch, 1, 1, n, dtype=dtype, device=device)
    return mask if padding is None else mask.masked_fill_(~padding[:, None, None], torch.finfo(dtype).min)
