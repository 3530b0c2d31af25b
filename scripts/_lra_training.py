"""One run of Long Range Arena: a method trained on a task from one seed, and its record."""

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _benchmark import PeakMemory
from _checkpoints import check_same_run
from _data import InputError, Row
from _lra_data import Task, collate
from _lra_model import METHODS, Classifier
from _metrics import Labels
from _record import provenance, write_json
from _training import Batch, Metrics, TableSteps, fit, predict
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict
from torch import nn


class Classification:
    """What the training loop has to know: the labels of examples, and that the lowest validation loss is the best."""

    best_metric = "loss"

    def __init__(self) -> None:
        self.metric = Labels()

    def collate(self, rows: list[Row]) -> Batch:
        return collate(rows)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(**batch)

    def weight(self, batch: Batch) -> int:
        return len(batch["labels"])

    def results(self, output: Any, batch: Batch) -> list[np.ndarray]:
        return list(output.logits.float().cpu().numpy())

    def metrics(self, results: list[np.ndarray], dataset: Dataset) -> Metrics:
        """Accuracy, macro F1 and mean cross-entropy of the logits of all examples."""
        logits, labels = torch.from_numpy(np.stack(results)), torch.as_tensor(dataset["labels"][:])
        found = self.metric.compute(predictions=logits.argmax(-1).tolist(), references=labels.tolist())
        return {**found, "loss": nn.functional.cross_entropy(logits, labels).item()}


class ReseededSteps(TableSteps):
    """Steps, in each of which the model draws other columns, the same in a step that is done again."""

    def __init__(self, dataset: Dataset, size: int, seed: int, model: Classifier) -> None:
        super().__init__(dataset, size, seed)
        self._model = model

    def __next__(self) -> list[Row]:
        self._model.reseed(self._seed + 1_000_003 * (self._epoch * len(self) + self._taken + 1))
        return super().__next__()


def run(
    task: Task, data: DatasetDict, settings: dict[str, Any], about: Mapping[str, Any], folder: Path, probe: bool = False
) -> dict[str, Any]:
    """Trains, tests and writes `record.json`; continues after an interruption, and keeps a run that is complete.

    Args:
        task: The task.
        data: Its prepared parts.
        settings: All that determines the run, as JSON: `method`, `seed`, `batch_size` (per step), `micro_batch`
            (at most so many examples per process and forward pass), `learning_rate`, `warmup`, `steps`, `eval_every`,
            `patience`, `mixed_precision`, and what the data is.
        about: More for the record.
        folder: Where checkpoints and the record go.
        probe: Look for the largest batch that fits, too.

    Returns:
        The record.

    Raises:
        InputError: The folder holds a run with other settings.
        RuntimeError: The loss is not finite.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes on CPUs would not find each other
        mixed_precision=settings["mixed_precision"],
        step_scheduler_with_optimizer=False,  # one scheduler step per step, however many processes there are
    )
    settings = settings | {"processes": accelerator.num_processes, "device": accelerator.device.type}
    was_begun = (folder / "checkpoints" / "settings.json").exists()
    if was_begun:
        check_same_run(folder / "checkpoints", settings)
    elif any(path.is_file() for path in folder.rglob("*")):
        raise InputError(f"{folder} is not empty and holds no run; name another --output-dir.")
    accelerator.wait_for_everyone()  # before any process fills the folder
    if (folder / "record.json").exists():
        accelerator.print(f"{folder.name} is complete.")
        return json.loads((folder / "record.json").read_text(encoding="utf-8"))

    accelerator.print(f"{folder.name}:")
    set_seed(settings["seed"])
    model = Classifier(task, METHODS[settings["method"]], settings["seed"])
    largest = _largest_batch(accelerator, model, task) if probe else None
    objective = Classification()

    def evaluate(prepared: nn.Module, part: str) -> Metrics:
        model.reseed(settings["seed"])
        return objective.metrics(
            predict(accelerator, objective, prepared, data[part], settings["micro_batch"]), data[part]
        )

    options = argparse.Namespace(
        output_dir=folder,
        resume=was_begun,
        seed=settings["seed"],
        batch_size=settings["micro_batch"],
        max_steps=settings["steps"],
        evaluate_every=settings["eval_every"],
        save_every=None,
        patience=settings["patience"],
        learning_rate=settings["learning_rate"],
        warmup_fraction=settings["warmup"] / settings["steps"],
        weight_decay=0.0,  # AdamW without it is Adam
        max_gradient_norm=math.inf,
    )
    steps = ReseededSteps(data["train"], settings["batch_size"], settings["seed"], model)
    with PeakMemory(accelerator.device.type, interval=0.02) as peak:  # since the last interruption
        prepared, progress = fit(
            accelerator, objective, model, steps, lambda prepared: evaluate(prepared, "validation"), options, settings
        )
    test = evaluate(prepared, "test")
    record = {
        "settings": settings,
        "skein": getattr(model.encoder.config, "skein", None),
        **about,
        **provenance("transformers", "accelerate", "datasets", "hf-skein"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": progress.losses,
        "evaluations": progress.validation,
        "best_step": progress.best_step,
        "test": test,
        "training_seconds": progress.training_seconds,
        "training_cpu_seconds": progress.training_cpu_seconds,
        "evaluation_seconds": progress.evaluation_seconds,
        "peak_memory_mib": peak.mib,
        "largest_batch": largest,
    }
    accelerator.print(f"{folder.name}: test " + ", ".join(f"{name} {value:.4f}" for name, value in test.items()))
    if accelerator.is_main_process:
        write_json(folder / "record.json", record)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return record


# The largest batch


def largest_that_fits(fits: Callable[[int], bool], limit: int = 4096) -> int:
    """The largest number from 1 to `limit` that `fits`, 0 if none does; `fits` is asked about 2 log2(limit) times."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _largest_batch(accelerator: Accelerator, model: Classifier, task: Task) -> int | None:
    """Most examples of the greatest length whose forward and backward pass fit the GPU; `None` on a CPU."""
    if accelerator.device.type == "cpu":
        accelerator.print("--largest-batch: skipped, a CPU has no limit that could be probed without harm.")
        return None
    model.to(accelerator.device).train()

    def fits(count: int) -> bool:
        try:
            shape = (task.texts, count, task.max_length)
            ids = torch.randint(1, task.vocabulary, shape, device=accelerator.device)
            labels = torch.zeros(count, dtype=torch.long, device=accelerator.device)
            with accelerator.autocast():
                loss = model(*ids, labels=labels).loss
            loss.backward()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    return largest_that_fits(fits)
