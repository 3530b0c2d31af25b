"""Adapt a masked language model to longer documents and to the sketch: continued pretraining on plain text.

A converted checkpoint has seen neither its new positions nor sketched attention. Some hundred steps of masked language
modelling on long texts let it get used to both, before it is fine-tuned for a task:

    python scripts/adapt_mlm.py --model roberta-base --dataset texts.txt --max-length 4096 --output-dir runs/adapted

A text longer than --max-length is cut into pieces. A plain text file (.txt) is taken apart at line ends into documents
of --document-characters or a little more; of a csv, jsonl or parquet file, a folder or the Hub each row is a document.
Each piece has its own masked tokens, 15% of them as BERT has it: a function of --seed and of the piece, the same in
every epoch.

The loss on held-out text is measured by the attention asked for and by exact attention (`exact_loss`), also before
training (step 0). A checkpoint without the head of a masked language model gets a new one, and a message says so: then
train it first on short pieces (--attn sdpa --max-length 128), and adapt the result.
"""

import argparse
import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import InputError, positive_int
from _finetuning import Row, Task, run_script
from _training import Metrics
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from torch import nn
from transformers import AutoModelForMaskedLM, DataCollatorForTokenClassification, PreTrainedModel


MASKED = 0.15  # of the tokens: Devlin et al. (2019); of these 80% become [MASK], 10% another token, 10% stay
SHORTEST = 8  # tokens; what is left of a text after its whole pieces is dropped below that


class AutoModelWithHead:
    """`AutoModelForMaskedLM` that tells which weights the checkpoint lacks."""

    @staticmethod
    def from_pretrained(name: str, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        """As Transformers' method with `output_loading_info=True`; prints the names of new weights."""
        model, info = AutoModelForMaskedLM.from_pretrained(name, **(kwargs | {"output_loading_info": True}))
        if info["missing_keys"]:
            print(
                f"{Path(name).name} lacks {', '.join(sorted(info['missing_keys']))}: these weights are new. Train "
                "them first on short pieces, with --attn sdpa --max-length 128, and adapt the result."
            )
        return model, info


def text_table(path: Path, folder: Path, size: int) -> Path:
    """A jsonl file in `folder` with the lines of a text file, in documents of at least `size` characters but the last.

    Raises:
        InputError: There is no such file, it is empty or not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    table = folder / f"{path.stem}.jsonl"
    try:
        with path.open(encoding="utf-8-sig") as text, table.open("w", encoding="utf-8") as output:
            output.writelines(json.dumps({"text": document}) + "\n" for document in _documents(text, size))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); convert it, as with iconv.") from error
    if not table.stat().st_size:
        raise InputError(f"{path} holds no documents.")
    return table


def _documents(lines: Iterable[str], size: int) -> Iterator[str]:
    document: list[str] = []
    characters = 0
    for line in itertools.chain(lines, [None]):
        if line is None or characters >= size:
            if (joined := "".join(document)).strip():
                yield joined
            document, characters = [], 0
        if line is not None:
            document.append(line)
            characters += len(line)


class MaskedLanguageModeling(Task):
    """Masked tokens of pieces of text."""

    description = __doc__
    auto_class = AutoModelWithHead
    validates_first = True

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        if args.too_long == "error":
            raise InputError("--too-long error: texts are cut into pieces of --max-length here, none is too long.")
        self._tables = tempfile.TemporaryDirectory()
        for option in ("dataset", "validation_file", "test_file"):
            path = getattr(args, option)
            if path and Path(path).suffix.lower() == ".txt":
                folder = Path(self._tables.name) / option
                folder.mkdir()
                setattr(args, option, str(text_table(Path(path), folder, args.document_characters)))

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("text")
        group.add_argument(
            "--document-characters",
            type=positive_int,
            default=32768,
            metavar="N",
            help="of the documents that a .txt file is taken apart into (default %(default)s)",
        )

    def encode(self, rows: Sequence[Row]) -> list[Row]:
        """The pieces of all rows, masked; `labels` is -100 where a token is not asked for."""
        if self.tokenizer.mask_token_id is None:
            raise InputError(f"--model {self.args.model}: its tokenizer has no mask token.")
        size = self.args.max_length - self.tokenizer.num_special_tokens_to_add()
        pieces = []
        for tokens in self.tokenizer([row["text"] for row in rows], add_special_tokens=False, verbose=False).input_ids:
            starts = range(0, len(tokens), size)
            pieces += [tokens[i : i + size] for i in starts if i == 0 or len(tokens) - i >= SHORTEST]
        return [self._mask(piece) for piece in pieces]

    def _mask(self, piece: list[int]) -> Row:
        ids = np.array(self._with_special_tokens(piece))
        ordinary = np.flatnonzero(~np.isin(ids, self.tokenizer.all_special_ids))
        digest = hashlib.sha256(f"{self.args.seed} ".encode() + ids.tobytes()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        chosen = draw.permutation(ordinary)[: max(1, round(MASKED * len(ordinary)))]
        labels = np.full(len(ids), -100)
        labels[chosen] = ids[chosen]
        kind = draw.random(len(chosen))
        ids[chosen[kind < 0.8]] = self.tokenizer.mask_token_id
        others = chosen[kind >= 0.9]
        ids[others] = draw.integers(len(self.tokenizer), size=len(others))
        return {
            "input_ids": ids.tolist(),
            "attention_mask": [1] * len(ids),
            "labels": labels.tolist(),
            "length": len(ids),
        }

    def _with_special_tokens(self, piece: list[int]) -> list[int]:
        """The piece between what the tokenizer puts around a text."""
        empty = self.tokenizer("")["input_ids"]
        return [*empty[: len(empty) - len(empty) // 2], *piece, *empty[len(empty) - len(empty) // 2 :]]

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        rows = [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows]
        return DataCollatorForTokenClassification(self.tokenizer, pad_to_multiple_of=self.padding_multiple)(rows)

    def forward(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        """In an evaluation also `exact_logits`, by exact attention."""
        output = model(**batch)
        if not model.training and self.args.attn == "skein":
            unwrapped = extract_model_from_parallel(model)
            unwrapped.set_attn_implementation("sdpa")
            try:
                output["exact_logits"] = model(**batch).logits
            finally:
                unwrapped.set_attn_implementation("skein")
        return output

    def weight(self, batch: dict[str, torch.Tensor]) -> int:
        return int((batch["labels"] != -100).sum())

    def results(self, output: Any, batch: dict[str, torch.Tensor]) -> list[tuple[float, float, int]]:
        """Of each piece: the sum of its tokens' losses, the same by exact attention, and how many tokens are masked."""

        def sums(logits: torch.Tensor) -> list[float]:
            losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), batch["labels"], reduction="none")
            return losses.sum(-1).tolist()

        counts = (batch["labels"] != -100).sum(-1).tolist()
        exact = output.get("exact_logits", output.logits)
        return list(zip(sums(output.logits), sums(exact), counts, strict=True))

    def metrics(self, results: list[tuple[float, float, int]], rows: Dataset, encoded: Dataset) -> Metrics:
        """Mean loss of a masked token and its exponential, by the attention asked for and by exact attention."""
        loss, exact, count = (float(total) for total in np.array(results).sum(0))
        loss, exact = loss / count, exact / count
        return {"loss": loss, "perplexity": math.exp(loss), "exact_loss": exact, "exact_perplexity": math.exp(exact)}


if __name__ == "__main__":
    run_script(MaskedLanguageModeling)
