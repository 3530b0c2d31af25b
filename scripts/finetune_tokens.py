"""Fine-tune a pretrained encoder to tag the words of long documents with sketched attention.

A row has a list of words and a list of their tags, such as B-PER, I-PER and O:

    python scripts/finetune_tokens.py --model bert-base-cased --dataset entities.jsonl \\
        --tokens-column words --tags-column ner_tags --max-length 4096 --output-dir runs/entities

A word's tag is that of its first token. Words that are cut off at --max-length count as tagged O. Several processes:
put `accelerate launch` in place of `python`. The folder given as --output-dir gets the model of the best F1 of
entities, its tokenizer, test_predictions.jsonl, learning_curve.png and record.json.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from _data import InputError
from _finetuning import Row, Task, label_order, run_script
from _metrics import Entities
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


OUTSIDE = "O"


class TokenClassification(Task):
    """Tags of words."""

    description = __doc__
    auto_class = AutoModelForTokenClassification
    columns: Mapping[str, str] = {"tokens": "list of words", "tags": "list of their tags"}
    best_metric = "f1"
    lora_task = "TOKEN_CLS"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.metric = Entities()
        self.names: list[str] = list(args.tags or [])

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("task")
        group.add_argument("--tags", nargs="+", help="all there are (default: those of the training documents)")

    def check(self, row: Row) -> Row:
        words, tags = row["tokens"], row["tags"]
        if not words:
            raise ValueError("have no words")
        if not (isinstance(words, list) and all(isinstance(word, str) and word.strip() for word in words)):
            raise ValueError("have tokens that are no list of words")
        if not isinstance(tags, list) or len(tags) != len(words) or None in tags:
            raise ValueError("have not one tag for each word")
        tags = [str(tag) for tag in tags]
        if self.args.tags and not set(tags) <= set(self.args.tags):
            raise ValueError("have a tag that is not among --tags")
        return row | {"tags": tags}

    def prepare(self, parts: Mapping[str, Dataset]) -> dict[str, Any]:
        if not self.args.tags:
            found = {part: {tag for tags in rows["tags"] for tag in tags} for part, rows in parts.items()}
            if "train" not in found:
                raise InputError("--streaming needs --tags: those of a stream are not known.")
            for part, tags in found.items():
                unknown = sorted(tags - found["train"])
                if unknown:
                    raise InputError(f"The tags {', '.join(unknown)} of {part} documents do not occur in training.")
            self.names = label_order(found["train"])
        if len(self.names) < 2:
            raise InputError(f"All words have the tag {self.names[0]!r}; there is nothing to learn.")
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
        }

    def load_model(self, **config_fields: Any) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        tokenizer, model = super().load_model(**config_fields)
        if not tokenizer.is_fast:
            raise InputError(f"--model {self.args.model} has a slow tokenizer, which does not tell words from tokens.")
        if getattr(tokenizer, "add_prefix_space", True) is False:  # else the words would be written together
            tokenizer = AutoTokenizer.from_pretrained(self.args.model, add_prefix_space=True)
            tokenizer.model_max_length = self.args.max_length
        return tokenizer, model

    def encode(self, rows: Sequence[Row]) -> list[Row]:
        words = [row["tokens"] for row in rows]
        whole = self.tokenizer(words, is_split_into_words=True, verbose=False)["input_ids"]
        inputs = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.args.max_length)
        encoded = []
        for i, row in enumerate(rows):
            labels, first_of = [], []
            for word in inputs.word_ids(i):
                is_first = word is not None and (not first_of or word != first_of[-1])
                labels.append(self.names.index(row["tags"][word]) if is_first else -100)
                first_of += [word] if is_first else []
            values = {name: column[i] for name, column in inputs.items()}
            encoded.append({**values, "labels": labels, "words": first_of, "length": len(whole[i])})
        return encoded

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        rows = [{name: value for name, value in row.items() if name not in ("words", "length")} for row in rows]
        return DataCollatorForTokenClassification(self.tokenizer, pad_to_multiple_of=self.padding_multiple)(rows)

    def weight(self, batch: dict[str, torch.Tensor]) -> int:
        return int((batch["labels"] != -100).sum())

    def results(self, output: Any, batch: dict[str, torch.Tensor]) -> list[tuple[list[int], float]]:
        """Tags of the words that were read, and their summed cross-entropy."""
        logits, labels = output.logits.float(), batch["labels"]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where -100
        return [
            (row.argmax(-1)[own != -100].tolist(), loss.sum().item())
            for row, own, loss in zip(logits, labels, losses, strict=True)
        ]

    def metrics(self, results: list[tuple[list[int], float]], rows: Dataset, encoded: Dataset) -> dict[str, float]:
        found = self.metric.compute(predictions=self._tags(results, rows, encoded), references=rows["tags"][:])
        read = sum(len(tags) for tags, _ in results)
        return {**found, "loss": sum(loss for _, loss in results) / max(read, 1)}

    def _tags(self, results: list[tuple[list[int], float]], rows: Dataset, encoded: Dataset) -> list[list[str]]:
        tagged = []
        for (tags, _), row, words in zip(results, rows, encoded["words"], strict=True):
            of_word = dict(zip(words, tags, strict=True))
            tagged.append([self.names[of_word[i]] if i in of_word else OUTSIDE for i in range(len(row["tokens"]))])
        return tagged

    def predictions(self, results: list[tuple[list[int], float]], rows: Dataset, encoded: Dataset) -> list[Row]:
        return [{**row, "prediction": tags} for row, tags in zip(rows, self._tags(results, rows, encoded), strict=True)]

    def record(self) -> dict[str, Any]:
        return {"tags": self.names}


if __name__ == "__main__":
    run_script(TokenClassification)
