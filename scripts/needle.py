"""Two needles in a long document: accuracy against length for truncation, chunk-and-pool, exact attention and skein.

Each document is small talk with one statement in its first quarter and another in its last one; either says yes or no.
The label tells whether they agree, so neither statement alone says anything about it (an exclusive or of two bits):

- truncated at --chunk tokens, a model sees the first statement at most, and stays at chance;
- chunk-and-pool (mean of the chunks' embeddings, a linear classifier) adds up what single chunks say, and no sum is
  the exclusive or: at most three of the four cases can be right;
- exact attention and skein read the whole document.

An encoder learns the task once on short documents, which all four methods would treat alike: at first on two statements
and little else, then on ever longer ones. (Begun with the longest of them it stays at chance.) From there each method
goes on by itself, from one length to the next: it is tested, trained on a few documents, and tested again.

    python scripts/needle.py --output benchmarks/results/needle

What is done is kept; the same command again continues after an interruption.
"""

import argparse
import functools
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _benchmark import (
    PeakMemory,
    format_table,
    load_encoder,
    make_parser,
    named_setting,
    new_figure,
    over_lengths,
    save_figure,
    start,
    use_attention,
)
from _record import ResumableRecord
from demo import SMALL_TALK, WORDS
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_skein import SkeinConfig


METHODS = ("truncated", "pooled", "exact", "skein")
SHORTEST = 48  # tokens of the first short documents

# What the two statements may look like, and the words for yes and no.
STATEMENTS = (
    ("The mayor has {} the new bridge.", "Our mayor said in public that the bridge was {}."),
    ("The council has {} the new bridge.", "Later the council declared that the bridge was {}."),
)
WORDS_OF_BIT = ("rejected", "accepted")


# Documents


class Documents(NamedTuple):
    """Token ids `[documents, length]` without padding, labels `[documents]`, and where each statement lies."""

    ids: Tensor
    labels: Tensor
    places: Tensor  # [documents, 2, 2]: begin and end of either statement, in tokens


def write_document(
    draw: random.Random, tokenizer: PreTrainedTokenizerBase, length: int, bits: tuple[int, int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Exactly `length` token ids, [CLS] and [SEP] included, and where the statements lie."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    statements = [
        encode(draw.choice(forms).format(WORDS_OF_BIT[bit])) for forms, bit in zip(STATEMENTS, bits, strict=True)
    ]
    rest = length - 2 - sum(map(len, statements))
    if rest < length // 2:
        raise SystemExit(f"error: two statements leave no room in a document of {length} tokens; give a larger length.")
    talk: list[int] = []
    ends = [0]  # where sentences of the small talk end
    while len(talk) < rest:
        words = {kind: draw.choice(choices) for kind, choices in WORDS.items()}
        talk += encode(draw.choice(SMALL_TALK).format(**words))
        ends.append(min(len(talk), rest))
    talk = talk[:rest]
    # At the end of a sentence, such that the whole statement is in the first or in the last quarter.
    quarter = length // 4
    first = draw.choice([end for end in ends if end + 1 + len(statements[0]) <= quarter])
    second = draw.choice([end for end in ends if 1 + end + len(statements[0]) >= length - quarter] or [rest])
    ids = [tokenizer.cls_token_id, *talk[:first], *statements[0], *talk[first:second], *statements[1], *talk[second:]]
    begins = [1 + first, 1 + second + len(statements[0])]
    places = [(begin, begin + len(ids)) for begin, ids in zip(begins, statements, strict=True)]
    return [*ids, tokenizer.sep_token_id], places


def write_documents(tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: str) -> Documents:
    """`count` documents of `length` tokens, the four cases of the two bits equally often; a function of `seed`."""
    draw = random.Random(seed)
    cases = [(i // 2 % 2, i % 2) for i in range(count)]
    draw.shuffle(cases)
    ids, places = zip(*(write_document(draw, tokenizer, length, bits) for bits in cases), strict=True)
    labels = [int(first == second) for first, second in cases]
    return Documents(torch.tensor(ids), torch.tensor(labels), torch.tensor(places))


# The model


class Classifier(nn.Module):
    """A linear classifier on the mean of the chunks' [CLS] states; a document that is not cut is one chunk."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(encoder.config.hidden_size, 2)
        nn.init.zeros_(self.linear.weight)

    def forward(self, chunks: list[Tensor]) -> Tensor:
        """Ids `[documents, tokens]` of each chunk to logits `[documents, 2]`."""
        states = [self.encoder(chunk).last_hidden_state[:, 0] for chunk in chunks]
        return self.linear(torch.stack(states).mean(0))


def cut(ids: Tensor, method: str, size: int) -> list[Tensor]:
    """What a method reads of documents `[documents, length]`, as chunks with [CLS] and [SEP] of their own.

    `truncated`: the first `size` tokens. `pooled`: as few chunks of at most `size` tokens as can be, of like length.
    """
    if method not in ("truncated", "pooled") or ids.shape[1] <= size:
        return [ids]
    first, body, last = ids[:, :1], ids[:, 1:-1], ids[:, -1:]
    if method == "truncated":
        bodies = [body[:, : size - 2]]
    else:
        bodies = body.tensor_split(-(-body.shape[1] // (size - 2)), dim=1)
    return [torch.cat([first, part, last], 1) for part in bodies]


def batches(documents: Documents, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels of `size` documents after others."""
    return zip(documents.ids.split(size), documents.labels.split(size), strict=True)


def classify(model: Classifier, ids: Tensor, method: str, args: argparse.Namespace) -> Tensor:
    """Logits `[documents, 2]` in float32 of whole documents `[documents, length]`."""
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
        return model(cut(ids.to(args.device), method, args.chunk)).float()


def train(
    model: Classifier, steps: list[tuple[Tensor, Tensor]], method: str, rate: float, args: argparse.Namespace
) -> list[float]:
    """One optimizer step per batch, documents one after another where they are long; returns the losses.

    Without dropout, which of a dozen steps would make nothing but noise. The rate falls linearly after a short warmup.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warmup = max(1, len(steps) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (len(steps) - i) / max(1, len(steps) - warmup))
    )
    losses = []
    for ids, labels in tqdm(steps, desc=f"{method}, {steps[0][0].shape[1]} tokens", leave=False):
        pieces = max(1, args.tokens_per_pass // ids.shape[1])
        total = 0.0
        for some, wanted in zip(ids.split(pieces), labels.split(pieces), strict=True):
            logits = classify(model, some, method, args)
            loss = F.cross_entropy(logits, wanted.to(args.device), reduction="sum") / len(ids)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
    return losses


@torch.no_grad()
def test(model: Classifier, documents: Documents, method: str, args: argparse.Namespace) -> float:
    """Accuracy."""
    size = max(1, args.tokens_per_pass // documents.ids.shape[1])
    right = 0
    for ids, labels in batches(documents, size):
        right += (classify(model, ids, method, args).argmax(-1).cpu() == labels).sum().item()
    return right / len(documents.labels)


# Parts of the record


def short_batches(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Length and number of the documents of each step on short documents.

    A step draws its length between two thirds of a limit and the limit, which grows geometrically, and has
    `args.short_tokens` tokens, but 8 documents at least.
    """
    draw = random.Random(args.seed)
    batches = []
    for i in range(1, args.short_steps + 1):
        limit = round(SHORTEST * (args.short_length / SHORTEST) ** (i / args.short_steps))
        length = draw.randint(max(SHORTEST, 2 * limit // 3), limit)
        batches.append((length, max(8, args.short_tokens // length // 4 * 4)))
    return batches


def learn_short(
    args: argparse.Namespace, model: Classifier, tokenizer: PreTrainedTokenizerBase, weights: Path
) -> list[dict[str, Any]]:
    """Trains on short documents, ever longer ones, with exact attention; leaves the weights in a file."""
    steps = []
    for i, (length, count) in enumerate(short_batches(args)):
        documents = write_documents(tokenizer, length, count, f"short {args.seed} {i}")
        steps.append((documents.ids, documents.labels))
    use_attention(model.encoder, None)
    begin = time.perf_counter()
    losses = train(model, steps, "exact", args.short_learning_rate, args)
    seconds = time.perf_counter() - begin
    accuracy = test(model, test_documents(args, tokenizer, args.short_length), "exact", args)
    save(model, weights)
    row = {"method": "short", "length": args.short_length, "accuracy": accuracy, "training_seconds": seconds}
    return [row | {"losses": losses}]


def save(model: Classifier, path: Path) -> None:
    """Writes the weights, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.new")
    torch.save(model.state_dict(), partial)
    partial.replace(path)


def test_documents(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, length: int) -> Documents:
    """The same for every method."""
    return write_documents(tokenizer, length, args.test_documents, f"test {args.seed} {length}")


def run_case(
    args: argparse.Namespace,
    method: str,
    length: int,
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    before: Path,
    after: Path,
) -> list[dict[str, Any]]:
    """Tests the weights of a file at one length by one method, trains and tests again; writes them to another file."""
    model.load_state_dict(torch.load(before, weights_only=True))
    use_attention(model.encoder, args.skein if method == "skein" else None)
    untrained = test(model, test_documents(args, tokenizer, length), method, args)
    documents = write_documents(tokenizer, length, args.train_documents, f"train {args.seed} {length}")
    with PeakMemory(args.device) as peak:
        begin = time.perf_counter()
        losses = train(model, list(batches(documents, args.batch_size)), method, args.learning_rate, args)
        training = time.perf_counter() - begin
    begin = time.perf_counter()
    accuracy = test(model, test_documents(args, tokenizer, length), method, args)
    seconds = {"training_seconds": training, "test_seconds": time.perf_counter() - begin}
    save(model, after)
    return [
        {
            "method": method,
            "length": length,
            "accuracy_before": untrained,
            "accuracy": accuracy,
            **seconds,
            "training_mib": peak.mib,
            "losses": losses,
        }
    ]


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Accuracy over length, and what it cost."""
    table = [["method", "tokens", "before", "accuracy", "training s", "test s", "training MiB"]]
    for row in rows:
        costs = [f"{row['training_seconds']:.0f}", f"{row['test_seconds']:.0f}", f"{row['training_mib']:.0f}"]
        accuracies = [f"{row['accuracy_before']:.3f}", f"{row['accuracy']:.3f}"]
        table.append([row["method"], str(row["length"]), *accuracies, *costs])
    print(format_table("Do two statements far apart agree?", table))


def plot(record: dict[str, Any], output: Path) -> None:
    """Accuracy and seconds over the length, one line per method."""
    figure, ((left, right),) = new_figure(2)
    rows = [row for row in record["rows"] if row["method"] != "short"]
    lengths = sorted({row["length"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = sorted((row for row in rows if row["method"] == method), key=lambda row: row["length"])
        x = [row["length"] for row in of_method]
        left.plot(x, [row["accuracy"] for row in of_method], "o-", label=method, alpha=0.8)
        right.plot(x, [row["training_seconds"] / record["train_documents"] for row in of_method], "o-", label=method)
    left.axhline(0.5, color="black", linestyle="dotted")
    left.set_ylim(0, 1.05)
    over_lengths(left, lengths, ylabel="test accuracy (dotted: chance)")
    over_lengths(right, lengths, ylabel="training: seconds per document", yscale="log")
    left.legend()
    counts = f"{record['train_documents']} training, {record['test_documents']} test documents"
    title = f"Two needles: {counts}; {record['model']}"
    save_figure(figure, title, record, output)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and returns its record."""
    parser = make_parser(__doc__, lengths=[1024, 2048, 4096, 8192, 16384], text=False)

    def number(name: str, kind: Callable, default: float, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, metavar="X", help=f"{text} (default %(default)s)")

    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument(
        "--skein",
        type=lambda fields: named_setting(f"skein:min_length=512,{fields}")[1],
        default=SkeinConfig(min_length=512),
        metavar="KEY=VALUE,...",
        help="fields of skein's SkeinConfig (default: its own, and min_length=512)",
    )
    parser.add_argument("--bf16", action="store_true", help="mixed precision (default: float32)")
    parser.add_argument("--longest-exact", type=int, metavar="N", help="no exact attention of more tokens")
    number("--train-documents", int, 16, "training documents of each length")
    number("--test-documents", int, 32, "test documents of each length")
    number("--batch-size", int, 4, "documents per step")
    number("--learning-rate", float, 3e-5, "peak")
    number("--short-steps", int, 250, "steps on short documents")
    number("--short-learning-rate", float, 2e-4, "peak, on short documents")
    number("--short-length", int, 512, "most tokens of a short document")
    number("--short-tokens", int, 1536, "tokens per step on short documents")
    number("--chunk", int, 512, "tokens of a truncated document, and most tokens of a chunk")
    number("--tokens-per-pass", int, 4096, "documents go through the model together up to so many tokens")
    number("--seed", int, 0, "of the documents")
    args = parser.parse_args(argv)
    too_short = [length for length in args.lengths if length < 2 * args.chunk]
    if too_short:
        parser.error(
            f"--lengths {too_short[0]}: a document must have twice --chunk tokens, {2 * args.chunk}, at least."
        )

    header = start(args, __file__) | {"skein": args.skein.to_dict()}
    encoder, tokenizer = load_encoder(args.model, max(args.lengths), device=args.device)
    torch.manual_seed(args.seed)
    model = Classifier(encoder).to(args.device).eval()
    record = ResumableRecord(args.output, header, selection=("methods", "longest_exact"))
    weights = args.output.with_suffix(".short.partial.pt")
    (short,) = record.part("short", functools.partial(learn_short, args, model, tokenizer, weights))
    print(f"short documents: accuracy {short['accuracy']:.3f} in {short['training_seconds']:.0f} s", flush=True)
    latest = dict.fromkeys(args.methods, weights)
    for length in sorted(args.lengths):
        for method in args.methods:
            if method == "exact" and args.longest_exact is not None and length > args.longest_exact:
                continue
            after = args.output.with_suffix(f".{method}-{length}.partial.pt")
            make = functools.partial(run_case, args, method, length, model, tokenizer, latest[method], after)
            (row,) = record.part(f"{method} {length}", make)
            if latest[method] != weights:
                latest[method].unlink(missing_ok=True)
            latest[method] = after
            print(f"{method}, {length} tokens: accuracy {row['accuracy']:.3f}", flush=True)
    result = record.finish()
    for path in {weights, *latest.values()}:
        path.unlink(missing_ok=True)
    print_rows(result["rows"][1:])
    plot(result, args.output)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
