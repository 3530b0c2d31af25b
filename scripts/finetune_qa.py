"""Fine-tune a pretrained encoder to find answers in long documents with sketched attention.

Rows are as in SQuAD: a question, a context, and answers as {"text": [...], "answer_start": [...]}, which may be empty:

    python scripts/finetune_qa.py --model bert-base-uncased --dataset train.jsonl --validation-file dev.jsonl \\
        --max-length 4096 --output-dir runs/qa

The model reads question and context at once, in one window without strides. An answer that is cut off at --max-length
is counted, and a question that has only such ones is left out of the loss. Several processes: put `accelerate launch`
in place of `python`. The folder given as --output-dir gets the model of the best F1, its tokenizer,
test_predictions.jsonl, learning_curve.png and record.json.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from _data import InputError, positive_int
from _finetuning import Row, Task, check_text, run_script
from _metrics import Answers
from datasets import Dataset
from torch import nn
from torch.nn import functional
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase


NOWHERE = -100  # the place of an answer that is cut off
NOT_FOR_COLLATOR = ("length", "offsets", "first", "last", "lost")
NOT_FOR_MODEL = ("window", "start_positions", "end_positions")


class QuestionAnswering(Task):
    """Answers that are spans of a context."""

    description = __doc__
    auto_class = AutoModelForQuestionAnswering
    columns: Mapping[str, str] = {"question": "question", "context": "document", "answers": "answers"}
    best_metric = "f1"
    lora_task = "QUESTION_ANS"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.metric = Answers()

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("task")
        group.add_argument(
            "--max-answer-tokens", type=positive_int, default=30, metavar="N", help="default %(default)s"
        )

    def check(self, row: Row) -> Row:
        check_text(row, "question", "context")
        answers = row["answers"]
        if answers is None or answers == "":
            raise ValueError('have no answers; where there is none they are {"text": [], "answer_start": []}')
        if isinstance(answers, str):  # as a csv file has it
            try:
                answers = json.loads(answers)
            except json.JSONDecodeError:
                raise ValueError("have answers that are no JSON") from None
        texts, starts = (answers.get(key) if isinstance(answers, dict) else None for key in ("text", "answer_start"))
        if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
            raise ValueError('have answers that are not {"text": [...], "answer_start": [...]}')
        for text, start in zip(texts, starts, strict=True):
            is_span = isinstance(text, str) and text.strip() and isinstance(start, int) and start >= 0
            if not is_span or row["context"][start : start + len(text)] != text:
                raise ValueError("have an answer that is not in the context at its answer_start")
        return row | {"answers": {"text": texts, "answer_start": starts}}

    def load_model(self, **config_fields: Any) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        tokenizer, model = super().load_model(**config_fields)
        if not tokenizer.is_fast:
            raise InputError(f"--model {self.args.model} has a slow tokenizer, which does not tell where tokens are.")
        return tokenizer, model

    def encode(self, rows: Sequence[Row]) -> list[Row]:
        questions, contexts = [row["question"] for row in rows], [row["context"] for row in rows]
        whole = self.tokenizer(questions, contexts, verbose=False)["input_ids"]
        room = self.args.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        for row, tokens in zip(rows, self.tokenizer(questions, add_special_tokens=False)["input_ids"], strict=True):
            if len(tokens) >= room:
                raise InputError(
                    f"The question of document {row['name']!r} has {len(tokens)} tokens and leaves no room for its "
                    f"context within --max-length {self.args.max_length}."
                )
        inputs = self.tokenizer(
            questions, contexts, truncation="only_second", max_length=self.args.max_length, return_offsets_mapping=True
        )
        offsets = inputs.pop("offset_mapping")
        encoded = []
        for i, row in enumerate(rows):
            inside = [token for token, part in enumerate(inputs.sequence_ids(i)) if part == 1]
            values = {name: column[i] for name, column in inputs.items()}
            spans = [
                (
                    inputs.char_to_token(i, start + len(text) - len(text.lstrip()), 1),
                    inputs.char_to_token(i, start + len(text.rstrip()) - 1, 1),
                )
                for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            ]
            kept = [span for span in spans if None not in span]
            begin, end = (kept[0] if kept else (NOWHERE, NOWHERE)) if spans else (self._null(values),) * 2
            encoded.append(
                {
                    **values,
                    "start_positions": begin,
                    "end_positions": end,
                    "length": len(whole[i]),
                    "offsets": [list(pair) for pair in offsets[i]],
                    "first": inside[0] if inside else 0,
                    "last": inside[-1] if inside else -1,
                    "lost": bool(spans) and not kept,
                }
            )
        return encoded

    def _null(self, inputs: Row) -> int:
        """The token that stands for "no answer": CLS."""
        return inputs["input_ids"].index(self.tokenizer.cls_token_id)

    def counts(self, encoded: Sequence[Row] | Dataset) -> dict[str, int]:
        return {"answers_truncated": sum(row["lost"] for row in encoded)}

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        batch = super().collate([{n: v for n, v in row.items() if n not in NOT_FOR_COLLATOR} for row in rows])
        return {**batch, "window": torch.tensor([[row["first"], row["last"]] for row in rows])}

    def forward(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        output = model(**{name: value for name, value in batch.items() if name not in NOT_FOR_MODEL})
        output.loss = span_loss(output, batch)
        return output

    def weight(self, batch: dict[str, torch.Tensor]) -> int:
        return int((batch["start_positions"] != NOWHERE).sum())

    def results(self, output: Any, batch: dict[str, torch.Tensor]) -> list[tuple[int, int] | None]:
        """The tokens `[first, last]` of the best answer within the context; `None` if no answer is better."""
        starts, ends = output.start_logits.float().cpu().numpy(), output.end_logits.float().cpu().numpy()
        null = (batch["input_ids"] == self.tokenizer.cls_token_id).int().argmax(-1).tolist()
        found = []
        for start, end, at, (first, last) in zip(starts, ends, null, batch["window"].tolist(), strict=True):
            span, score = best_span(start[first : last + 1], end[first : last + 1], self.args.max_answer_tokens)
            found.append(
                (first + span[0], first + span[1]) if span is not None and score > start[at] + end[at] else None
            )
        return found

    def metrics(self, results: list[tuple[int, int] | None], rows: Dataset, encoded: Dataset) -> dict[str, float]:
        references = [answers["text"] for answers in rows["answers"]]
        return self.metric.compute(predictions=self._texts(results, rows, encoded), references=references)

    def _texts(self, results: list[tuple[int, int] | None], rows: Dataset, encoded: Dataset) -> list[str]:
        return [
            "" if span is None else context[offsets[span[0]][0] : offsets[span[1]][1]]
            for span, context, offsets in zip(results, rows["context"], encoded["offsets"], strict=True)
        ]

    def predictions(self, results: list[tuple[int, int] | None], rows: Dataset, encoded: Dataset) -> list[Row]:
        return [
            {"name": row["name"], "question": row["question"], "answers": row["answers"]["text"], "prediction": text}
            for row, text in zip(rows, self._texts(results, rows, encoded), strict=True)
        ]


def span_loss(output: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the first and the last token of the answers that are in their documents.

    Over valid tokens: models that are given the positions count padding as well, so that their loss depends on its
    amount, and so on the documents beside.
    """
    padding = batch["attention_mask"] == 0  # [batch, n]
    ends = ((output.start_logits, "start_positions"), (output.end_logits, "end_positions"))
    losses = [
        functional.cross_entropy(logits.float().masked_fill(padding, -torch.inf), batch[name], ignore_index=NOWHERE)
        for logits, name in ends
    ]
    return (losses[0] + losses[1]) / 2


def best_span(start: np.ndarray, end: np.ndarray, most: int) -> tuple[tuple[int, int] | None, float]:
    """The span `[i, j]` of at most `most` tokens, `i <= j`, with the greatest `start[i] + end[j]`, and that sum.

    Args:
        start: Logits `[n]`.
        end: Logits `[n]`.
        most: The longest span, in tokens.
    """
    if not len(start):
        return None, -np.inf
    padded = np.append(end, np.full(most - 1, -np.inf))
    sums = start[:, None] + np.lib.stride_tricks.sliding_window_view(padded, most)  # [n, most]
    i, more = np.unravel_index(sums.argmax(), sums.shape)
    return (int(i), int(i + more)), float(sums[i, more])


if __name__ == "__main__":
    run_script(QuestionAnswering)
