"""Tiny models trained from scratch: with the sketch they end where they end with exact attention.

A document gives each of a few keys a value, once, at a place of its own; every other token names a key, and its label
is that key's value. Every token must find one other token: a mean of all values (V-Mean) stays at chance.
"""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForTokenClassification

import hf_skein


KEYS, VALUES, LENGTH = 4, 4, 96
STEPS, BATCH, LEARNING_RATE = 140, 6, 5e-3
FIRST = 5  # token ids below are special: 1 pads, 2 is [CLS]; then come the keys, then the pairs of key and value
CHANCE = math.log(VALUES)
LEARNT = 0.25 * CHANCE

COMMON = {"vocab_size": FIRST + KEYS + KEYS * VALUES, "num_labels": VALUES, "initializer_range": 0.1}
COMMON |= {"pad_token_id": 1, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
COMMON |= {"max_position_embeddings": LENGTH + 2}
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = {
    "bert": SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {"dim": 64, "hidden_dim": 64, "n_layers": 1, "n_heads": 2, "dropout": 0.0, "attention_dropout": 0.0},
    "modernbert": SIZES,  # rotary positions, norms before the layers; layer 0 attends to everything
}
METHODS = {
    "adaptive": {"method": "adaptive", "num_columns": 16, "num_strata": 4, "block_size": 16},
    "skeinformer": {"method": "skeinformer", "num_columns": 32},
    "vmean": {"method": "vmean", "num_columns": 16},
}


def make_documents(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels `[BATCH, LENGTH]`; the label is -100 where nothing is asked."""
    value = torch.randint(VALUES, (BATCH, KEYS), generator=generator)
    key = torch.randint(KEYS, (BATCH, LENGTH), generator=generator)
    place = 1 + torch.rand(BATCH, LENGTH - 1, generator=generator).argsort(1)[:, :KEYS]
    pairs = FIRST + KEYS + VALUES * torch.arange(KEYS) + value
    ids, labels = (FIRST + key).scatter(1, place, pairs), value.gather(1, key).scatter(1, place, -100)
    ids[:, 0], labels[:, 0] = 2, -100
    return ids, labels


def final_loss(family: str, attention: str) -> float:
    """Mean loss of the last tenth of training, on documents never seen before; the same for every `attention`."""
    config = AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    if attention != "sdpa":
        hf_skein.configure(config, **METHODS[attention], min_length=0)
    implementation = "sdpa" if attention == "sdpa" else "skein"
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(config, attn_implementation=implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 10) * (1 - i / STEPS))
    documents, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        ids, labels = make_documents(documents)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-STEPS // 10 :]) / (STEPS // 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_ends_in_the_same_loss_band(family):
    losses = {attention: final_loss(family, attention) for attention in ("sdpa", "adaptive", "skeinformer")}
    assert max(losses.values()) < LEARNT, losses


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_of_all_values_does_not_learn_it(family):
    assert final_loss(family, "vmean") > 0.9 * CHANCE
