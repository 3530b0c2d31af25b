"""Fine-tune a pretrained encoder to classify long documents with sketched attention.

A document has one label, any number of labels (--problem multi-label) or a number (--problem regression). Two examples,
the second with the usual folds of the film reviews of Pang and Lee (2004):

    python scripts/finetune_classification.py --model bert-base-uncased --dataset reviews.csv \\
        --max-length 4096 --output-dir runs/reviews
    python scripts/finetune_classification.py --model bert-base-uncased --dataset movie_reviews.zip \\
        --fold-regex 'cv(\\d)' --validation-fold 8 --test-fold 9 --max-length 1024 --output-dir runs/movies

Several processes: put `accelerate launch` in place of `python`. The folder given as --output-dir gets the model of the
best evaluation, its tokenizer, test_predictions.jsonl, learning_curve.png and record.json.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from _data import InputError
from _finetuning import Row, Task, check_text, label_order, run_script
from _metrics import Labels, LabelSets, Numbers
from datasets import Dataset
from torch.nn import functional
from transformers import AutoModelForSequenceClassification


class Classification(Task):
    """Labels or numbers of whole documents."""

    description = __doc__
    auto_class = AutoModelForSequenceClassification
    columns: Mapping[str, str] = {"text": "text", "label": "label, list of labels or number"}
    lora_task = "SEQ_CLS"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        if args.label_separator and args.problem != "multi-label":
            raise InputError("--label-separator needs --problem multi-label.")
        if args.labels and args.problem == "regression":
            raise InputError("--labels has no meaning with --problem regression.")
        self.metric = {"single-label": Labels, "multi-label": LabelSets, "regression": Numbers}[args.problem]()
        self.best_metric = {"single-label": "accuracy", "multi-label": "micro_f1", "regression": "loss"}[args.problem]
        self.names: list[str] = list(args.labels or [])

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("task")
        group.add_argument(
            "--problem",
            default="single-label",
            choices=("single-label", "multi-label", "regression"),
            help="default %(default)s",
        )
        group.add_argument(
            "--labels", nargs="+", metavar="LABEL", help="all there are (default: those of the training documents)"
        )
        group.add_argument(
            "--label-separator", metavar="TEXT", help="multi-label: between labels, where they are no list"
        )

    def check(self, row: Row) -> Row:
        check_text(row, "text")
        label = row["label"]
        may_be_empty = self.args.problem == "multi-label"
        if label is None or (label == "" and not may_be_empty) or (isinstance(label, float) and math.isnan(label)):
            raise ValueError("have no label")
        if self.args.problem == "regression":
            return row | {"label": _number(label)}
        if self.args.problem == "single-label":
            if isinstance(label, list | dict):
                raise ValueError("have a list of labels; see --problem multi-label")
            labels = [str(label)]
        elif isinstance(label, list):
            if None in label:
                raise ValueError("have a list of labels with an empty place")
            labels = [str(item) for item in label]
        elif self.args.label_separator:
            labels = [item.strip() for item in str(label).split(self.args.label_separator) if item.strip()]
        else:
            raise ValueError("have no list of labels; give --label-separator")
        if self.args.labels and not set(labels) <= set(self.args.labels):
            raise ValueError("have a label that is not among --labels")
        return row | {"label": labels[0] if self.args.problem == "single-label" else sorted(set(labels))}

    def stratum(self, row: Row) -> str:
        return "" if self.args.problem == "regression" else json.dumps(row["label"])

    def prepare(self, parts: Mapping[str, Dataset]) -> dict[str, Any]:
        if self.args.problem == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        found = {part: {name for row in rows for name in self._labels(row)} for part, rows in parts.items()}
        if not self.args.labels:
            if "train" not in found:
                raise InputError("--streaming needs --labels: those of a stream are not known.")
            self.names = label_order(found["train"])
            for part, names in found.items():
                unknown = sorted(names - found["train"])
                if unknown:
                    raise InputError(f"The labels {', '.join(unknown)} of {part} documents do not occur in training.")
        if len(names := sorted(found.get("train", self.names))) < 2 and self.args.problem == "single-label":
            raise InputError(f"All training documents have the label {names[0]!r}; there is nothing to learn.")
        if not self.names:
            raise InputError("No training document has a label; there is nothing to learn.")
        problem = {"single-label": "single_label_classification", "multi-label": "multi_label_classification"}
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
            "problem_type": problem[self.args.problem],
        }

    def _labels(self, row: Row) -> list[str]:
        return [row["label"]] if self.args.problem == "single-label" else row["label"]

    def encode(self, rows: Sequence[Row]) -> list[Row]:
        return [{**inputs, "labels": self._target(row)} for row, inputs in zip(rows, super().encode(rows), strict=True)]

    def _target(self, row: Row) -> int | float | list[float]:
        if self.args.problem == "regression":
            return row["label"]
        if self.args.problem == "single-label":
            return self.names.index(row["label"])
        return [float(name in row["label"]) for name in self.names]

    def results(self, output: Any, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        return list(output.logits.float().cpu().numpy())

    def metrics(self, results: list[np.ndarray], rows: Dataset, encoded: Dataset) -> dict[str, float]:
        logits = torch.from_numpy(np.stack(results))  # [documents, labels]
        targets = torch.tensor(encoded["labels"][:])
        if self.args.problem == "regression":
            loss = functional.mse_loss(logits[:, 0], targets)
        elif self.args.problem == "single-label":
            loss = functional.cross_entropy(logits, targets)
        else:
            loss = functional.binary_cross_entropy_with_logits(logits, targets)
        if self.args.problem == "multi-label":
            targets = targets.long()
        found = self.metric.compute(predictions=self._decide(logits), references=targets.tolist())
        return {**found, "loss": loss.item()}

    def _decide(self, logits: torch.Tensor) -> list:
        if self.args.problem == "regression":
            return logits[:, 0].tolist()
        if self.args.problem == "single-label":
            return logits.argmax(-1).tolist()
        return (logits > 0).long().tolist()  # a probability above one half

    def predictions(self, results: list[np.ndarray], rows: Dataset, encoded: Dataset) -> list[Row]:
        decided = self._decide(torch.from_numpy(np.stack(results)))
        if self.args.problem == "single-label":
            decided = [self.names[i] for i in decided]
        elif self.args.problem == "multi-label":
            decided = [[name for name, on in zip(self.names, row, strict=True) if on] for row in decided]
        return [
            {"name": row["name"], "label": row["label"], "prediction": prediction}
            for row, prediction in zip(rows, decided, strict=True)
        ]

    def record(self) -> dict[str, Any]:
        return {} if self.args.problem == "regression" else {"labels": self.names}


def _number(label: Any) -> float:
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(label, bool) or not math.isfinite(value):
        raise ValueError("have a label that is no number")
    return value


if __name__ == "__main__":
    run_script(Classification)
