"""Fine-tune an encoder to embed long documents for retrieval, with sketched attention.

Trains on pairs of a query and the document that answers it, all other documents of the batch being wrong answers, those
of other processes included. An embedding is the mean of the last hidden states, of length one:

    python scripts/finetune_embedding.py --model sentence-transformers/all-MiniLM-L6-v2 --dataset pairs.jsonl \\
        --query-column question --document-column article --max-length 4096 --output-dir runs/retrieval

More documents in a batch make a harder task: raise --batch-size as far as memory allows (--gradient-checkpointing
helps; --gradient-accumulation-steps adds no wrong answers). Measured on held-out pairs: each query against all their
documents. The folder given as --output-dir gets the encoder; load it with AutoModel and take the mean over the valid
tokens, or in sentence-transformers as docs/finetuning.md shows.
"""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _data import positive_float
from _finetuning import Row, Task, check_text, run_script
from _metrics import LocalMetric
from accelerate import PartialState
from datasets import Dataset, Features, Value
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase


PARTS = ("query", "document")


class Retrieval(LocalMetric):
    """Mean reciprocal rank (0 below the tenth place), and the share of right documents among the first 1, 5 and 10.

    Predictions are the ranks of the right documents, counted from 1; references are all 1.
    """

    features = Features({"predictions": Value("int64"), "references": Value("int64")})

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        ranks = np.array(predictions)
        found = {"mrr_at_10": float(np.where(ranks <= 10, 1 / ranks, 0).mean())}
        return found | {f"recall_at_{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}


class Embedding(Task):
    """Queries and documents near each other where they belong together."""

    description = __doc__
    auto_class = AutoModel
    columns: Mapping[str, str] = {"query": "query, or anchor", "document": "document that answers it, or positive"}
    best_metric = "mrr_at_10"
    lora_task = "FEATURE_EXTRACTION"
    batches_add_up = False

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("task")
        group.add_argument(
            "--temperature", type=positive_float, default=0.05, metavar="X", help="of the cosines (default %(default)s)"
        )

    def check(self, row: Row) -> Row:
        return check_text(row, *PARTS)

    def load_model(self, **config_fields: Any) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """Without training of the pooler, which a mean of hidden states does not use."""
        tokenizer, model = super().load_model(**config_fields)
        if getattr(model, "pooler", None) is not None:
            model.pooler.requires_grad_(False)
        return tokenizer, model

    def encode(self, rows: Sequence[Row]) -> list[Row]:
        """`input_ids` are the document's, `query_ids` the query's; equal documents have the same number `document`."""
        limits = {"truncation": True, "max_length": self.args.max_length}
        encoded = {part: self.tokenizer([row[part] for row in rows], **limits)["input_ids"] for part in PARTS}
        whole = [self.tokenizer([row[part] for row in rows], verbose=False)["input_ids"] for part in PARTS]
        return [
            {
                "input_ids": encoded["document"][i],
                "query_ids": encoded["query"][i],
                "document": int.from_bytes(hashlib.sha256(row["document"].encode()).digest()[:7], "big"),
                "length": max(len(texts[i]) for texts in whole),
            }
            for i, row in enumerate(rows)
        ]

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {
            "query": self._pad([row["query_ids"] for row in rows]),
            "input": self._pad([row["input_ids"] for row in rows]),
            "document": torch.tensor([row["document"] for row in rows]),
        }

    def _pad(self, ids: list[list[int]]) -> dict[str, Tensor]:
        padded = self.tokenizer.pad({"input_ids": ids}, pad_to_multiple_of=self.padding_multiple, return_tensors="pt")
        return {name: padded[name] for name in ("input_ids", "attention_mask")}

    def weight(self, batch: dict[str, Any]) -> int:
        return len(batch["document"])

    def forward(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """Embeddings `[batch, hidden]` of `queries` and `documents`; in training also the `loss`."""
        queries, documents = (embed(model, batch[name]) for name in ("query", "input"))
        output = SimpleNamespace(queries=queries, documents=documents)
        if model.training:
            candidates, numbers = gather(documents, batch["document"], self.args.batch_size)
            output.loss = contrastive_loss(queries, batch["document"], candidates, numbers, self.args.temperature)
        return output

    def results(self, output: Any, batch: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray, int]]:
        queries, documents = (x.float().cpu().numpy() for x in (output.queries, output.documents))
        return list(zip(queries, documents, batch["document"].tolist(), strict=True))

    def metrics(self, results: list[tuple[np.ndarray, np.ndarray, int]], rows: Dataset, encoded: Dataset) -> dict:
        return Retrieval().compute(predictions=find_ranks(results), references=[1] * len(results))

    def predictions(self, results: list[tuple], rows: Dataset, encoded: Dataset) -> list[Row]:
        ranks = find_ranks(results)
        return [{"name": row["name"], "rank": rank} for row, rank in zip(rows, ranks, strict=True)]


def embed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean of the last hidden states of valid tokens, scaled to length 1: ids `[batch, n]` to `[batch, hidden]`."""
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def gather(documents: Tensor, numbers: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Documents `[batch, hidden]` and their numbers `[batch]` of all processes, `size` at most of each.

    The gradient of a document is the sum over the losses of all processes.
    """
    if PartialState().num_processes == 1:
        return documents, numbers
    missing = size - len(documents)  # processes may have one more or less
    padded = [*all_gather(F.pad(documents, (0, 0, 0, missing)))]
    others = [torch.empty(size, dtype=numbers.dtype, device=numbers.device) for _ in padded]
    dist.all_gather(others, F.pad(numbers, (0, missing), value=-1))
    found = torch.cat(others)
    return torch.cat(padded)[found >= 0], found[found >= 0]


def contrastive_loss(
    queries: Tensor, numbers: Tensor, documents: Tensor, candidates: Tensor, temperature: float
) -> Tensor:
    """Mean of `-log softmax_j(q·d_j / temperature)` at the right document, `j` running over different documents.

    Args:
        queries: `[batch, hidden]`.
        numbers: `[batch]`, of the right documents.
        documents: `[candidates, hidden]`, those among them; one that occurs again counts once.
        candidates: `[candidates]`, their numbers.
        temperature: Divides the cosines.
    """
    same = candidates[:, None] == candidates
    is_first = ~same.tril(-1).any(1)
    logits = queries @ documents[is_first].T / temperature
    right = (numbers[:, None] == candidates[is_first]).int().argmax(1)
    return F.cross_entropy(logits.float(), right)


def find_ranks(results: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> list[int]:
    """The rank of each query's document, from 1, among all different documents; of equal scores the worse counts."""
    queries, documents, numbers = (np.stack(column) for column in zip(*results, strict=True))
    _, first, index = np.unique(numbers, return_index=True, return_inverse=True)
    scores = queries @ documents[first].T  # [queries, different documents]
    right = scores[np.arange(len(queries)), index]
    return (scores >= right[:, None]).sum(1).tolist()


if __name__ == "__main__":
    run_script(Embedding)
