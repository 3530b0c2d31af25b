"""The tables of Long Range Arena: runs merged into one record, printed beside the paper's figures, and drawn."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _benchmark import new_figure, number, save_figure
from _data import InputError
from _lra_data import TASKS
from _lra_model import METHODS


# As reported for the paper's Tables 1 and 2 (Skeinformer and standard only): Chen et al., "Sketching as a Tool for
# Understanding and Accelerating Self-attention for Long Sequences", NAACL 2022, arXiv 2112.05359; V100, 16 GB.
PAPER = {
    "accuracy": {
        "standard": {"text": 57.69, "listops": 38.15, "retrieval": 80.10, "pathfinder": 73.59, "image": 37.97},
        "skeinformer": {"text": 62.47, "listops": 38.73, "retrieval": 80.42, "pathfinder": 71.51, "image": 37.27},
    },
    "average": {"standard": 57.50, "skeinformer": 58.08},
    "minutes": {"standard": {"text": 50.63}, "skeinformer": {"text": 9.60}},
}

BEGIN, END = "<!-- made by scripts/lra.py report -->", "<!-- end -->"

# What may differ between the runs of a task; all else must not, or they could not be compared.
OF_A_RUN = ("method", "seed")

NOT_RUN = "-"

Record = dict[str, Any]


# The record


def merge(folders: Iterable[Path]) -> Record:
    """One record of all complete runs below some folders.

    Raises:
        InputError: There are none, two of one method and seed, or runs of a task that differ in more than these.
    """
    paths = sorted(path for folder in folders for path in folder.rglob("record.json"))
    if not paths:
        raise InputError(f"There is no record.json of a complete run below {', '.join(map(str, folders))}.")
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    order = {name: i for i, name in enumerate((*TASKS, *METHODS))}
    runs.sort(
        key=lambda run: (order[run["settings"]["task"]], order[run["settings"]["method"]], run["settings"]["seed"])
    )
    first = runs[0]
    tasks: dict[str, Record] = {}
    for run in runs:
        settings = {name: value for name, value in run["settings"].items() if name not in OF_A_RUN}
        common = {"settings": settings, "data": run["data"]}
        known = tasks.setdefault(run["settings"]["task"], common)
        for what, one, other in (
            ("settings", known["settings"], settings),
            ("versions", first["versions"], run["versions"]),
            ("hardware", first["hardware"], run["hardware"]),
        ):
            names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
            if names:
                raise InputError(
                    f"Runs of {run['settings']['task']} differ in their {what}: {', '.join(names)}. Only runs that are "
                    "alike but for method and seed can be compared; report the others on their own."
                )
    keys = [tuple(run["settings"][name] for name in ("task", *OF_A_RUN)) for run in runs]
    if len(set(keys)) < len(keys):
        double = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"There are two runs of {', '.join(map(str, double))}; delete one.")
    left_out = ("settings", "data", "versions", "hardware")
    commits = {run["commit"] for run in runs}
    return {
        "script": "lra.py",
        "device": first["settings"]["device"],
        "versions": first["versions"],
        "hardware": first["hardware"],
        "commit": first["commit"] if len(commits) == 1 else None,  # else the rows say which
        "tasks": tasks,
        "rows": [
            dict(zip(("task", *OF_A_RUN), key, strict=True))
            | {name: value for name, value in run.items() if name not in left_out}
            for key, run in zip(keys, runs, strict=True)
        ],
    }


def rows_of(record: Record, task: str, method: str) -> list[Record]:
    """The runs of a method on a task."""
    return [row for row in record["rows"] if row["task"] == task and row["method"] == method]


def accuracies(rows: Sequence[Record]) -> list[float]:
    """Test accuracy of each run in percent."""
    return [100 * row["test"]["accuracy"] for row in rows]


def minutes(rows: Sequence[Record], clock: str = "training_seconds") -> float:
    """Minutes per thousand steps, mean over runs; of the wall clock, or `training_cpu_seconds`."""
    return statistics.mean(row[clock] / len(row["losses"]) * 1000 / 60 for row in rows)


def guess(record: Record, task: str) -> float:
    """Test accuracy, in percent, of always giving the label that is most frequent in training."""
    shares = [record["tasks"][task]["data"]["parts"][part]["label_shares"] for part in ("train", "test")]
    return 100 * shares[1][shares[0].index(max(shares[0]))]


# Tables


def tables(record: Record) -> str:
    """Budgets and both tables, as Markdown."""
    tasks = [task for task in TASKS if task in record["tasks"]]
    run = {row["method"] for row in record["rows"]}
    methods = [method for method in METHODS if method in run or method in PAPER["accuracy"]]
    return "\n\n".join(
        [
            _budgets(record, tasks),
            _accuracy_table(record, methods),
            *[_cost_table(record, task, methods) for task in tasks],
        ]
    )


def _table(rows: list[list[str]]) -> str:
    header, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rest])


def _budgets(record: Record, tasks: list[str]) -> str:
    table = [["", "data", "steps", "examples per step", "learning rate", "training / test", "mean length", "seeds"]]
    for task in tasks:
        settings, parts = record["tasks"][task]["settings"], record["tasks"][task]["data"]["parts"]
        paper = TASKS[task]
        examples = " / ".join(f"{parts[part]['examples']:,}" for part in ("train", "test"))
        seeds = sorted({row["seed"] for row in record["rows"] if row["task"] == task})
        table.append(
            [
                task,
                record["tasks"][task]["data"].get("source", NOT_RUN),
                f"{settings['steps']:,} of {paper.steps:,}",
                f"{settings['batch_size']} of {paper.batch_size}",
                f"{settings['learning_rate']:g} ({paper.learning_rate:g})",
                examples,
                f"{parts['train']['mean_length']:,.0f}",
                ", ".join(map(str, seeds)),
            ]
        )
    return (
        'The budget of these runs, equal for all methods, beside that of the paper\'s code ("of", and in parentheses):'
        "\n\n" + _table(table)
    )


def _accuracy_table(record: Record, methods: list[str]) -> str:
    table = [["test accuracy, %", *[f"{task} (paper)" for task in TASKS], "average (paper)"]]
    for method in methods:
        cells, means = [], []
        for task in TASKS:
            values = accuracies(rows_of(record, task, method))
            means += [statistics.mean(values)] if values else []
            cells.append(_cell(_mean_and_deviation(values), PAPER["accuracy"].get(method, {}).get(task)))
        average = number(statistics.mean(means), ".2f") if len(means) == len(TASKS) else NOT_RUN
        cells.append(_cell(average, PAPER["average"].get(method)))
        table.append([METHODS[method].title, *cells])
    guesses = [number(guess(record, task), ".2f") if task in record["tasks"] else NOT_RUN for task in TASKS]
    table.append(["most frequent label", *guesses, NOT_RUN])
    return f"Mean and standard deviation over seeds; {NOT_RUN} was not run.\n\n" + _table(table)


def _mean_and_deviation(values: list[float]) -> str:
    if len(values) < 2:
        return number(values[0], ".2f") if values else NOT_RUN
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _cell(ours: str, paper: float | None) -> str:
    return ours if paper is None else f"{ours} ({paper:.2f})"


def _cost_table(record: Record, task: str, methods: list[str]) -> str:
    header = [
        task,
        "minutes per 1,000 steps (paper)",
        "processor minutes",
        "peak MiB",
        "largest batch",
        "steps",
        "best",
    ]
    table = [header]
    for method in methods:
        rows = rows_of(record, task, method)
        paper = PAPER["minutes"].get(method, {}).get(task)
        if not rows:
            if paper is not None:
                table.append([METHODS[method].title, _cell(NOT_RUN, paper), *[NOT_RUN] * (len(header) - 2)])
            continue
        largest = rows[0]["largest_batch"]
        table.append(
            [
                METHODS[method].title,
                _cell(f"{minutes(rows):.2f}", paper),
                f"{minutes(rows, 'training_cpu_seconds'):.2f}",
                f"{statistics.median(row['peak_memory_mib'] for row in rows):,.0f}",
                NOT_RUN if largest is None else str(largest),
                ", ".join(str(len(row["losses"])) for row in rows),
                ", ".join(str(row["best_step"]) for row in rows),
            ]
        )
    return _table(table)


def update_docs(path: Path, text: str, check: bool = False) -> None:
    """Puts text between the markers of a Markdown file.

    Raises:
        InputError: The file has no such markers; or under `check`, which writes nothing, the text is another.
    """
    before = path.read_text(encoding="utf-8")
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(BEGIN) > before.index(END):
        raise InputError(f"{path} must hold the lines {BEGIN} and {END}, once each and in this order.")
    head, rest = before.split(BEGIN)
    after = f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"
    if check and after != before:
        raise InputError(f"{path} is not what the record says; run `lra.py report` without --check.")
    if not check:
        path.write_text(after, encoding="utf-8")


# The picture


def plot(record: Record, output: Path) -> None:
    """Accuracy of each run, and the cost of a step, per task."""
    tasks = [task for task in TASKS if task in record["tasks"]]
    figure, axes = new_figure(3, len(tasks))
    for (left, middle, right), task in zip(axes, tasks, strict=True):
        methods = [method for method in METHODS if rows_of(record, task, method)]
        titles = [METHODS[method].title for method in methods]
        for i, method in enumerate(methods):
            rows = rows_of(record, task, method)
            left.plot([i] * len(rows), accuracies(rows), "o", color=f"C{i}")
            for row in rows:
                steps = [evaluation["step"] for evaluation in row["evaluations"]]
                losses = [evaluation["loss"] for evaluation in row["evaluations"]]
                middle.plot(steps, losses, ".-", color=f"C{i}", label=titles[i] if row is rows[0] else None)
        left.axhline(guess(record, task), color="black", linestyle=":", label="most frequent label")
        left.set(ylabel=f"{task}: test accuracy, %; a dot is a seed", xlim=(-0.5, len(methods) - 0.5))
        left.set_xticks(range(len(methods)), titles)
        left.legend()
        middle.set(xlabel="steps", ylabel="validation loss; a line is a seed")
        middle.legend()
        clock = "training_cpu_seconds" if record["device"] == "cpu" else "training_seconds"
        costs = [minutes(rows_of(record, task, method), clock) for method in methods]
        right.bar_label(right.bar(titles, costs, color=[f"C{i}" for i in range(len(methods))]), fmt="%.1f")
        settings = record["tasks"][task]["settings"]
        what = "processor minutes" if record["device"] == "cpu" else "minutes"
        right.set(ylabel=f"{what} per 1,000 steps of {settings['batch_size']}")
        for axis in (left, right):
            axis.tick_params("x", rotation=20)
    budgets = ", ".join(f"{task} {record['tasks'][task]['settings']['steps']} steps" for task in tasks)
    save_figure(figure, f"Long Range Arena, {budgets}", record, output)
