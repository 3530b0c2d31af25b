"""Long Range Arena in the setting of the Skeinformer paper: prepare a task, train methods on it, print the tables.

    python scripts/lra.py prepare listops --output runs/lra/listops
    python scripts/lra.py train --data runs/lra/listops --methods standard skeinformer adaptive --seeds 0 1 2 \\
        --output-dir runs/lra/results
    python scripts/lra.py report runs/lra/results --output benchmarks/results/lra --docs docs/lra.md

Every command can be given again after an interruption and continues; what is complete is kept. Several GPUs: put
`accelerate launch` in place of `python`. See docs/lra.md for the setting and the data.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from _data import PARTS, InputError, positive_int
from _lra_data import (
    PATIENCE,
    TASKS,
    from_image,
    from_listops,
    from_pathfinder,
    from_retrieval,
    from_text,
    read_prepared,
    write_prepared,
)
from _lra_model import METHODS
from _lra_report import merge, plot, tables, update_docs
from _lra_training import run
from _record import write_json


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("prepare", help="read or generate the data of a task")
    tasks = command.add_subparsers(dest="task", required=True)
    listops = tasks.add_parser("listops", help="generated, or basic_{train,val,test}.tsv of the release")
    listops.add_argument("--source", type=Path, metavar="FOLDER", help="of the release (default: generate)")
    listops.add_argument("--balanced", action="store_true", help="as many expressions of every value")
    text = tasks.add_parser("text", help="film reviews, byte by byte")
    text.add_argument(
        "--source", default="stanfordnlp/imdb", help="data set of the Hub, folder or zip file (default %(default)s)"
    )
    retrieval = tasks.add_parser("retrieval", help="new_aan_pairs.{train,eval,test}.tsv of the release")
    retrieval.add_argument("--source", type=Path, required=True, metavar="FOLDER", help="of the release")
    pathfinder = tasks.add_parser("pathfinder", help="pictures of our own generator, or of the release")
    pathfinder.add_argument("--source", type=Path, metavar="FOLDER", help="of the release (default: generate)")
    image = tasks.add_parser("image", help="CIFAR-10 in grey levels")
    image.add_argument(
        "--source", default="uoft-cs/cifar10", help="folder of the binary version, or of the Hub (default %(default)s)"
    )
    for command, counts in ((listops, (96_000, 2_000, 2_000)), (pathfinder, (160_000, 20_000, 20_000))):
        for part, count in zip(PARTS, counts, strict=True):
            command.add_argument(f"--{part}", type=positive_int, default=count, metavar="N", help="default %(default)s")
    for part in PARTS:
        text.add_argument(f"--{part}", type=positive_int, metavar="N", help="at most so many (default: all)")
    for task in (listops, text, retrieval, pathfinder, image):
        task.add_argument("--seed", type=int, default=0, help="of what is drawn (default %(default)s)")
        task.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must not exist")

    command = commands.add_parser("train", help="train methods on a prepared task")
    command.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="from `lra.py prepare`")
    command.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default 0 1 2")
    command.add_argument("--output-dir", type=Path, required=True, metavar="FOLDER", help="gets a folder for each run")
    budget = command.add_argument_group("budget, by default that of the paper's code")
    budget.add_argument("--batch-size", type=positive_int, metavar="N", help="examples per step")
    budget.add_argument(
        "--micro-batch", type=positive_int, metavar="N", help="examples per process and pass (default: a whole step)"
    )
    budget.add_argument("--learning-rate", type=float, metavar="X", help="peak, after linear warmup")
    budget.add_argument("--warmup", type=int, metavar="STEPS")
    budget.add_argument("--steps", type=positive_int, metavar="STEPS", help="at most")
    budget.add_argument("--eval-every", type=positive_int, metavar="STEPS", help="also the time between checkpoints")
    budget.add_argument(
        "--patience", type=positive_int, default=PATIENCE, help="stop after so many evaluations without a lower loss"
    )
    command.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no", help="default %(default)s")
    command.add_argument("--largest-batch", action="store_true", help="also probe the largest batch that fits the GPU")

    command = commands.add_parser("report", help="merge runs into one record; tables beside the paper's, and a picture")
    command.add_argument("runs", nargs="*", type=Path, metavar="FOLDER", help="of runs (default: the record)")
    command.add_argument("--output", type=Path, required=True, help="path without suffix of the .json and .png")
    command.add_argument("--docs", type=Path, metavar="FILE", help="Markdown file whose marked part gets the tables")
    command.add_argument("--check", action="store_true", help="only see whether --docs is what the record says")
    return parser


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the data of a task; returns what its `prepared.json` holds."""
    if args.output.exists():
        raise InputError(f"{args.output} exists; delete it or name another --output.")
    about: dict[str, Any] = {"source": "generated", "seed": args.seed}
    if args.source is not None:
        about["source"] = Path(args.source).name if Path(args.source).exists() else str(args.source)
    counts = {part: getattr(args, part, None) for part in PARTS}
    if args.task == "listops":
        about["balanced"] = args.balanced
        parts = from_listops(args.source, counts, args.seed, args.balanced)
    elif args.task == "text":
        parts = from_text(args.source, counts, args.seed)
    elif args.task == "retrieval":
        parts = from_retrieval(args.source)
    elif args.task == "pathfinder":
        parts = from_pathfinder(args.source, counts, args.seed)
    else:
        parts = from_image(args.source)
    return write_prepared(TASKS[args.task], parts, args.output, about)


def train(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs every method from every seed; returns the records."""
    task, data, prepared = read_prepared(args.data)
    budget = ("batch_size", "learning_rate", "warmup", "steps", "eval_every")
    common = {name: getattr(task, name) if getattr(args, name) is None else getattr(args, name) for name in budget}
    common["patience"] = args.patience
    common["micro_batch"] = args.micro_batch or common["batch_size"]
    common["mixed_precision"] = args.mixed_precision
    common["data_sha256"] = [prepared["parts"][part]["sha256"] for part in PARTS]
    records = []
    for seed in args.seeds:  # all methods once, before any a second time
        for method in args.methods:
            settings = {"task": task.name, "method": method, "seed": seed, **common}
            folder = args.output_dir / f"{task.name}-{method}-{seed}"
            records.append(run(task, data, settings, {"data": prepared}, folder, args.largest_batch))
    return records


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the tables; writes record and picture of `runs`, and the tables into `docs`; returns the record."""
    path = args.output.with_suffix(".json")
    if args.runs:
        record = merge(args.runs)
        if not args.check:
            write_json(path, record)
            plot(record, args.output)
    elif path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    else:
        raise InputError(f"There is no {path}; name folders of runs.")
    text = tables(record)
    print(text)
    if args.docs:
        update_docs(args.docs, text, args.check)
    return record


def main(argv: list[str] | None = None) -> Any:
    """Does what the command line says; returns what the command does."""
    args = make_parser().parse_args(argv)
    return {"prepare": prepare, "train": train, "report": report}[args.command](args)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
