"""A real task without any training: are embeddings by sketched attention as good, and what do they cost?

Mean-pooled embeddings of labelled documents (a folder or zip file with one folder of texts per label), by an encoder
whose position table is tiled to --max-length; a logistic regression on them, by cross-validation over folds that the
file names tell. Cases: truncated, exact attention; full length, exact; full length, skein on every layer, in its
default settings.

    python scripts/benchmark_embeddings.py --documents movie_reviews.zip --output benchmarks/results/embeddings

A case that is done is kept; the same command again continues after an interruption.
"""

import argparse
import functools
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from _benchmark import (
    embed,
    format_table,
    load_encoder,
    make_parser,
    named_setting,
    new_figure,
    number,
    read_documents,
    save_figure,
    start,
    use_attention,
)
from _data import fold_regex
from _record import ResumableRecord
from sklearn.linear_model import LogisticRegression
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_skein import SkeinConfig


# Whether a case reads the full documents, and its attention (None is exact). The others are compared to the first.
CASES: dict[str, tuple[bool, SkeinConfig | None]] = {
    "exact": (True, None),
    "truncated": (False, None),
    "skein": (True, SkeinConfig(min_length=0)),
}


def cross_validate(embeddings: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> list[float]:
    """Accuracy on each fold of a logistic regression on the others; embeddings `[documents, hidden]` of length 1."""
    accuracies = []
    for fold in np.unique(folds):
        test = folds == fold
        classifier = LogisticRegression(C=30, max_iter=1000).fit(embeddings[~test], labels[~test])
        accuracies.append(float(classifier.score(embeddings[test], labels[test])))
    return accuracies


def find_folds(names: Iterable[str], pattern: str) -> np.ndarray:
    """The fold of each document, from its file name."""
    found = {name: re.search(pattern, name) for name in names}
    for name, match in found.items():
        if match is None:
            raise SystemExit(f"error: --fold-regex {pattern} is not in the name {name!r}.")
    folds = np.array([match.group(1) for match in found.values()])
    if len(np.unique(folds)) < 2:
        raise SystemExit(f"error: --fold-regex {pattern} finds only the fold {folds[0]}; two at least are needed.")
    return folds


def run_case(
    args: argparse.Namespace,
    name: str,
    case: tuple[bool, SkeinConfig | None],
    encoder: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    texts: list[str],
    labels: np.ndarray,
    folds: np.ndarray,
    exact_file: Path,
) -> list[dict[str, Any]]:
    """The one row of a case: seconds, accuracy of each fold, and cosines to the embeddings of exact attention.

    Args:
        args: The options.
        name: The name of the case.
        case: As in `CASES`.
        encoder: Model and tokenizer.
        texts: The documents.
        labels: `[documents]`.
        folds: `[documents]`.
        exact_file: Where the case `exact` leaves its embeddings for the others.
    """
    is_full, config = case
    model, tokenizer = encoder
    max_length = args.max_length if is_full else args.truncate
    documents = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    use_attention(model, config)
    embed(model, tokenizer, documents[:2], args.tokens_per_batch)  # warms up
    begin = time.perf_counter()
    embeddings = F.normalize(embed(model, tokenizer, documents, args.tokens_per_batch, title=name), dim=-1).numpy()
    seconds = time.perf_counter() - begin
    if name == "exact":
        exact_file.parent.mkdir(parents=True, exist_ok=True)
        np.save(exact_file, embeddings)
    accuracies = cross_validate(embeddings, labels, folds)
    row = {
        "case": name,
        "max_length": max_length,
        "seconds": seconds,
        "tokens_per_second": sum(map(len, documents)) / seconds,
        "accuracy": float(np.mean(accuracies)),
        "accuracy_std": float(np.std(accuracies, ddof=1)),
        "fold_accuracies": accuracies,
    }
    if "exact" in args.cases:
        cosines = (embeddings * np.load(exact_file)).sum(-1)
        row |= {f"cosine_{what}": float(f(cosines)) for what, f in (("mean", np.mean), ("min", np.min))}
    return [row]


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A table of the cases."""
    table = [["", "tokens", "accuracy %", "+-", "seconds", "tokens/s", "cosine to exact: mean", "min"]]
    for row in rows:
        percent = [number(100 * row[key], ".1f") for key in ("accuracy", "accuracy_std")]
        costs = [number(row["seconds"], ".1f"), number(row["tokens_per_second"], ".0f")]
        cosines = [number(row.get(key), ".4f") for key in ("cosine_mean", "cosine_min")]
        table.append([row["case"], str(row["max_length"]), *percent, *costs, *cosines])
    print(format_table("Logistic regression on mean-pooled embeddings, mean and deviation over folds", table))


def plot(record: dict[str, Any], output: Path) -> None:
    """Accuracy and seconds of each case."""
    figure, ((left, right),) = new_figure(2)
    names = [row["case"] for row in record["rows"]]
    accuracies, deviations = ([100 * row[key] for row in record["rows"]] for key in ("accuracy", "accuracy_std"))
    left.bar_label(left.bar(names, accuracies, yerr=deviations, capsize=4), fmt="%.1f", label_type="center")
    left.set(ylabel="accuracy, % (bars: deviation over folds)")
    left.set_ylim(max(0, min(accuracies) - 10), min(100, max(accuracies) + 10))
    right.bar_label(right.bar(names, [row["seconds"] for row in record["rows"]], color="tab:orange"), fmt="%.0f")
    right.set(ylabel="seconds to embed all documents")
    for axis in (left, right):
        axis.tick_params("x", rotation=20)
    title = f"{record['count']} documents of {record['documents']}, {record['model']}, no training of it"
    save_figure(figure, title, record, output)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and returns its record."""
    parser = make_parser(__doc__, text=False)
    parser.add_argument("--documents", type=Path, required=True, help="a folder or zip file of labelled .txt files")
    parser.add_argument("--fold-regex", type=fold_regex, default=r"cv(\d)", help="default %(default)s, in a file name")
    parser.add_argument("--max-length", type=int, default=2048, metavar="N", help="default %(default)s tokens")
    parser.add_argument("--truncate", type=int, default=512, metavar="N", help="default %(default)s tokens")
    parser.add_argument("--tokens-per-batch", type=int, default=8192, metavar="N", help="default %(default)s")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument(
        "--setting",
        type=named_setting,
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="a case of your own, full length, as 'mine:num_columns=256'; can be repeated",
    )
    args = parser.parse_args(argv)

    cases = {name: case for name, case in CASES.items() if name in args.cases}
    cases |= {name: (True, config) for name, config in args.setting}
    header = start(args, __file__, "scikit-learn")
    data = read_documents(args.documents)
    texts, labels, folds = list(data["text"]), np.array(data["label"]), find_folds(data["name"], args.fold_regex)
    encoder = load_encoder(args.model, args.max_length, device=args.device)
    ids = encoder[1](texts, truncation=True, max_length=args.max_length)["input_ids"]
    lengths = np.array([len(x) for x in ids])
    header |= {"cases": {name: config and config.to_dict() for name, (_, config) in cases.items()}}
    header |= {"count": len(texts), "mean_tokens": float(lengths.mean())}
    header |= {"truncated": int((lengths > args.truncate).sum())}

    record = ResumableRecord(args.output, header)
    exact_file = args.output.with_suffix(".exact.partial.npy")
    for name, case in cases.items():
        make = functools.partial(run_case, args, name, case, encoder, texts, labels, folds, exact_file)
        (row,) = record.part(name, make)
        print(f"{name}: {100 * row['accuracy']:.1f} % in {row['seconds']:.0f} s", flush=True)
    result = record.finish()
    exact_file.unlink(missing_ok=True)
    print_rows(result["rows"])
    plot(result, args.output)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
