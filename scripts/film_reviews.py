"""Fine-tune on whole film reviews: truncation, exact attention, skein and Skeinformer, from several seeds.

MiniLM, extended to 2,048 tokens, learns the task from the first 256 tokens of all training reviews, with exact
attention. From that checkpoint, the same for all, it goes on training on whole reviews with each kind of attention.
Folds 0 to 7 are for training, 8 for validation, 9 for the test (Pang and Lee 2004). Every run is one of
finetune_classification.py in a process of its own; what is complete is kept, what is not is resumed.

    python scripts/film_reviews.py --dataset movie_reviews.zip --runs runs/films \\
        --output benchmarks/results/film_reviews
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _benchmark import find_minilm, format_table, new_figure, save_figure, start
from _record import write_json
from transformers import AutoModel, AutoTokenizer


Record = dict[str, Any]

SCRIPT = Path(__file__).with_name("finetune_classification.py")
FOLDS = ("--fold-regex", r"cv(\d)", "--validation-fold", "8", "--test-fold", "9")

# How each case reads a review: its title, and options of finetune_classification.py.
CASES = {
    "truncated": ("truncated at {truncate}, exact", ("--attn", "sdpa")),
    "exact": ("whole, exact", ("--attn", "sdpa")),
    **{
        f"skein-{columns}": (
            f"whole, skein, {columns} columns",
            ("--attn", "skein", "--skein-num-columns", str(columns)),
        )
        for columns in (64, 128, 256)
    },
    "skeinformer-256": (
        "whole, Skeinformer, 256 columns",
        ("--attn", "skein", "--skein-method", "skeinformer", "--skein-num-columns", "256"),
    ),
}


# Runs


def train(folder: Path, options: list[str], threads: int | None) -> Record:
    """The record of a run of finetune_classification.py in `folder`, begun, continued or complete."""
    command = [*options, "--output-dir", str(folder)]
    settings = folder / "command.json"
    said = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else command
    if said != command:
        raise SystemExit(f"error: {folder} is a run with other options; delete it, or name another --runs.")
    if not (folder / "record.json").exists():
        write_json(settings, command)
        is_begun = (folder / "checkpoints" / "settings.json").exists()
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        mode = "--resume" if is_begun else "--overwrite"
        subprocess.run([sys.executable, str(SCRIPT), *command, mode], check=True, env=environment)
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


def without_attention_dropout(model: str, folder: Path) -> Path:
    """A copy of the model with attention dropout 0: dropout of n x n matrices is what only exact attention pays for."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        AutoModel.from_pretrained(model, attention_probs_dropout_prob=0.0).save_pretrained(partial)
        AutoTokenizer.from_pretrained(model).save_pretrained(partial)
        partial.replace(folder)
    return folder


def common_options(args: argparse.Namespace, batch_size: int, rate: float) -> list[str]:
    """What all runs share."""
    given = {
        "dataset": args.dataset,
        "batch-size": 1,
        "gradient-accumulation-steps": batch_size,
        "learning-rate": rate,
        "mixed-precision": args.mixed_precision,
        "max-validation-documents": args.validation_documents,
        "max-test-documents": args.test_documents,
    }
    return [*FOLDS, *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def learn_excerpts(args: argparse.Namespace) -> Record:
    """The checkpoint that all cases begin with."""
    model = without_attention_dropout(args.model or str(find_minilm()), args.runs / "model")
    options = [
        *("--model", str(model), *common_options(args, args.batch_size, args.excerpt_learning_rate), "--attn", "sdpa"),
        *("--max-length", str(args.excerpt), "--epochs", str(args.excerpt_epochs)),
    ]
    return train(args.runs / "excerpts", options, args.threads)


def run_case(args: argparse.Namespace, case: str, seed: int) -> Record:
    """The row of one case and seed."""
    _, attention = CASES[case]
    length = args.truncate if case == "truncated" else args.max_length
    options = [
        *("--model", str(args.runs / "excerpts"), *common_options(args, args.batch_size, args.learning_rate)),
        *(*attention, "--max-length", str(length), "--seed", str(seed), "--epochs", str(args.epochs)),
        *("--max-train-documents", str(args.train_documents)),
    ]
    if "skein" in attention:
        options += ["--skein-min-length", str(args.min_length)]
    run = train(args.runs / f"{case}-{seed}", options, args.threads)
    names = ("training_seconds", "training_cpu_seconds", "peak_memory_mib", "best_step", "validation", "losses")
    names += ("commit", "hardware", "skein")
    test = {"accuracy": run["test"]["accuracy"], "loss": run["test"]["loss"], "test_seconds": run["test"]["seconds"]}
    lengths = {"lengths": {part: run["lengths"][part] for part in ("train", "test")}}
    return {"case": case, "seed": seed, **test, **lengths, **{name: run[name] for name in names}}


# The record


def title(case: str, record: Record) -> str:
    """What tables and pictures call a case."""
    return CASES[case][0].format(**record)


def summarize(rows: list[Record]) -> dict[str, Record]:
    """Of each case, over its seeds: mean accuracy and its deviation, and what it cost.

    The minutes of training are those of the clock on a GPU, else those of the processor, which other work on the
    machine disturbs less.
    """
    summary = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        accuracy = [row["accuracy"] for row in of_case]
        clock = "training_seconds" if of_case[0]["hardware"]["gpu"] else "training_cpu_seconds"
        summary[case] = {
            "accuracy": statistics.mean(accuracy),
            "accuracy_std": statistics.stdev(accuracy) if len(accuracy) > 1 else None,
            "loss": statistics.mean(row["loss"] for row in of_case),
            "training_minutes": statistics.median(row[clock] for row in of_case) / 60,
            "peak_memory_mib": max(row["peak_memory_mib"] for row in of_case),
        }
    return summary


def print_summary(record: Record) -> None:
    """The table."""
    table = [["", "accuracy", "test loss", "training min", "peak MiB"]]
    for case, found in record["summary"].items():
        deviation = "" if found["accuracy_std"] is None else f" ± {100 * found['accuracy_std']:.1f}"
        cells = [title(case, record), f"{100 * found['accuracy']:.1f}{deviation} %", f"{found['loss']:.3f}"]
        costs = [f"{found['training_minutes']:.1f}", f"{found['peak_memory_mib']:.0f}"]
        table.append([*cells, *costs])
    print(format_table(f"Film reviews, seeds {', '.join(map(str, record['seeds']))}", table))


def plot(record: Record, output: Path) -> None:
    """Accuracy of each seed and their mean, over the time of training."""
    figure, ((left, right),) = new_figure(2)
    for case, found in record["summary"].items():
        rows = [row for row in record["rows"] if row["case"] == case]
        (line,) = left.plot(
            found["training_minutes"], 100 * found["accuracy"], "o", markersize=9, label=title(case, record)
        )
        minutes = [found["training_minutes"]] * len(rows)
        left.plot(minutes, [100 * row["accuracy"] for row in rows], "_", color=line.get_color())
        right.plot(found["training_minutes"], found["peak_memory_mib"], "o", markersize=9, color=line.get_color())
    clock = "minutes" if record["rows"][0]["hardware"]["gpu"] else "processor minutes"
    left.set(xlabel=f"training, {clock}", ylabel="test accuracy, % (bars: seeds)")
    right.set(xlabel=f"training, {clock}", ylabel="peak memory, MiB")
    figure.legend(loc="outside lower center", ncols=3)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    counts = f"{record['train_documents']} training reviews, epochs: {record['epochs']}"
    save_figure(figure, f"Film reviews, {record['model']}: {counts}, {record['mixed_precision']}", record, output)


def main(argv: list[str] | None = None) -> Record:
    """Runs what is missing and returns the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the .json and .png written")
    parser.add_argument("--model", help="Hub id or folder of an encoder (default: the installed MiniLM)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as PyTorch chooses)")
    parser.add_argument("--dataset", required=True, help="folder or zip file of the reviews, in `neg` and `pos`")
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="gets a folder for each run")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default %(default)s")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="bf16", help="default %(default)s")

    def number(name: str, kind: type, default: float, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, metavar="X", help=f"{text} (default %(default)s)")

    number("--train-documents", int, 320, "whole reviews to train on; excerpts are of all")
    number("--validation-documents", int, 40, "of fold 8")
    number("--test-documents", int, 200, "of fold 9")
    number("--max-length", int, 2048, "tokens of a whole review")
    number("--truncate", int, 512, "tokens of a truncated review")
    number("--min-length", int, 512, "tokens up to which skein is exact")
    number("--epochs", int, 1, "over whole reviews")
    number("--batch-size", int, 8, "reviews per step, which pass through the model one by one, without padding")
    number("--learning-rate", float, 5e-5, "peak, on whole reviews")
    number("--excerpt", int, 256, "tokens of an excerpt")
    number("--excerpt-epochs", int, 3, "over excerpts")
    number("--excerpt-learning-rate", float, 1e-4, "peak, on excerpts")
    args = parser.parse_args(argv)

    header = start(args, __file__, "accelerate", "datasets")
    header |= {"dataset": Path(args.dataset).name, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    del header["runs"], header["seed"]
    excerpts = learn_excerpts(args)
    rows = [run_case(args, case, seed) for seed in args.seeds for case in args.cases]
    named = ("test", "training_seconds", "best_step", "validation")
    record = header | {"excerpts": {name: excerpts[name] for name in named}, "summary": summarize(rows), "rows": rows}
    write_json(args.output.with_suffix(".json"), record)
    print_summary(record)
    plot(record, args.output)
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
