"""One run of Long Range Arena: a method trained on a task from one seed, and its record."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from _benchmark import PeakMemory
from _finetuning import InputError, LengthGroupedBatches, load_checkpoint, save_checkpoint
from _lra_data import Task, collate
from _lra_model import METHODS, Classifier
from _record import provenance, write_json
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict
from finetune_classification import classification_metrics, predict
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler


@dataclass
class Progress:
    """How far a run has come; part of every checkpoint, the best weights so far included."""

    epoch: int = 0
    batch: int = 0  # batches of the running epoch that are done
    step: int = 0
    losses: list[float] = field(default_factory=list)  # one per step
    evaluations: list[dict[str, float]] = field(default_factory=list)  # with their `step`
    best: int | None = None  # index into evaluations: the lowest loss
    best_weights: dict[str, torch.Tensor] | None = None
    training_seconds: float = 0.0
    training_cpu_seconds: float = 0.0  # of this process, all its threads together
    evaluation_seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)

    def is_over(self, settings: Mapping[str, Any]) -> bool:
        """Whether all steps are done, or the last `patience` evaluations brought no lower loss."""
        since_best = 0 if self.best is None else len(self.evaluations) - 1 - self.best
        return self.step >= settings["steps"] or since_best >= settings["patience"]


def run(
    task: Task, data: DatasetDict, settings: dict[str, Any], about: Mapping[str, Any], folder: Path, probe: bool = False
) -> dict[str, Any]:
    """Trains, tests and writes `record.json`; continues after an interruption, and keeps a run that is complete.

    Args:
        task: The task.
        data: Its prepared parts.
        settings: All that determines the run, as JSON: `method`, `seed`, `batch_size` (per step), `micro_batch`
            (examples per process and forward pass), `learning_rate`, `warmup`, `steps`, `eval_every`, `patience`,
            `mixed_precision`, and what the data is.
        about: More for the record.
        folder: Where checkpoints and the record go.
        probe: Look for the largest batch that fits, too.

    Returns:
        The record.

    Raises:
        InputError: The folder holds a run with other settings, or the batch cannot be divided.
        RuntimeError: The loss is not finite.
    """
    # An accelerator without accumulation knows the number of processes, which accumulation depends on.
    processes = Accelerator(mixed_precision=settings["mixed_precision"]).num_processes
    accumulation, rest = divmod(settings["batch_size"], settings["micro_batch"] * processes)
    if rest or not accumulation:
        raise InputError(
            f"A batch of {settings['batch_size']} cannot be made of {settings['micro_batch']} examples on each of "
            f"{processes} processes; choose --micro-batch so that the product divides --batch-size."
        )
    accelerator = Accelerator(
        mixed_precision=settings["mixed_precision"],
        gradient_accumulation_steps=accumulation,
        step_scheduler_with_optimizer=False,  # one scheduler step per step, however many processes there are
    )
    settings = settings | {"processes": processes, "device": accelerator.device.type}
    _begin(accelerator, folder, settings)
    if (folder / "record.json").exists():
        accelerator.print(f"{folder.name} is complete.")
        return json.loads((folder / "record.json").read_text(encoding="utf-8"))

    set_seed(settings["seed"])
    model = Classifier(task, METHODS[settings["method"]])
    largest = _largest_batch(accelerator, model, task) if probe else None
    model, progress, test, peak = _train(accelerator, model, data, settings, folder)
    record = {
        "settings": settings,
        "skein": getattr(accelerator.unwrap_model(model).encoder.config, "skein", None),
        **about,
        **provenance("transformers", "accelerate", "datasets", "hf-skein"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": progress.losses,
        "evaluations": progress.evaluations,
        "best_step": progress.evaluations[progress.best]["step"],
        "test": test,
        "training_seconds": progress.training_seconds,
        "training_cpu_seconds": progress.training_cpu_seconds,
        "evaluation_seconds": progress.evaluation_seconds,
        "peak_memory_mib": peak,
        "largest_batch": largest,
    }
    accelerator.print(f"{folder.name}: test " + ", ".join(f"{name} {value:.4f}" for name, value in test.items()))
    if accelerator.is_main_process:
        write_json(folder / "record.json", record)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return record


def _begin(accelerator: Accelerator, folder: Path, settings: dict[str, Any]) -> None:
    """Leaves the settings in the folder, or compares them with those that are there."""
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))
        if names:
            changed = ", ".join(f"{name} (was {before.get(name)}, now {settings.get(name)})" for name in names)
            raise InputError(f"{folder} holds a run with another {changed}; delete it or name another --output-dir.")
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no run; name another --output-dir.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(path, settings)
    accelerator.wait_for_everyone()


def _train(
    accelerator: Accelerator, model: Classifier, data: DatasetDict, settings: Mapping[str, Any], folder: Path
) -> tuple[nn.Module, Progress, dict[str, float], float]:
    """The model with the weights of the lowest validation loss, the progress, the metrics of the test, and peak MiB.

    The peak is that since the last interruption, above what was in use before the first step.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["learning_rate"])
    loader = _loader(data["train"], settings["micro_batch"], settings["seed"])
    validation, test = (_loader(data[part], settings["micro_batch"]) for part in ("validation", "test"))
    batches = loader.batch_sampler
    model, optimizer, loader, validation, test = accelerator.prepare(model, optimizer, loader, validation, test)
    scheduler = accelerator.prepare(get_scheduler("linear", optimizer, settings["warmup"], settings["steps"]))
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    set_seed(settings["seed"], device_specific=True)  # another dropout on every process
    load_checkpoint(accelerator, folder / "checkpoints")
    if progress.step:
        accelerator.print(f"{folder.name} continues at step {progress.step}.")

    def evaluate(loader: DataLoader) -> dict[str, float]:
        begin = time.perf_counter()
        accelerator.unwrap_model(model).reseed(settings["seed"])
        metrics = classification_metrics(*predict(accelerator, model, loader))
        progress.evaluation_seconds += time.perf_counter() - begin
        return metrics

    bar = tqdm(
        total=settings["steps"],
        initial=progress.step,
        unit="step",
        desc=folder.name,
        disable=not accelerator.is_main_process,
    )
    with PeakMemory(accelerator.device.type, interval=0.02) as peak:
        while not progress.is_over(settings):
            batches.epoch = progress.epoch
            for _ in _steps(accelerator, model, optimizer, scheduler, loader, progress, settings):
                bar.update()
                bar.set_postfix(epoch=progress.epoch + 1, loss=f"{progress.losses[-1]:.4f}")
                if progress.step % settings["eval_every"] and progress.step < settings["steps"]:
                    continue
                _note(progress, evaluate(validation), accelerator.unwrap_model(model))
                accelerator.print(" ".join(f"{name} {value:.4g}" for name, value in progress.evaluations[-1].items()))
                save_checkpoint(accelerator, folder / "checkpoints", progress.step)
                if progress.is_over(settings):
                    break
            else:
                progress.epoch += 1
                progress.batch = 0
    bar.close()
    accelerator.unwrap_model(model).load_state_dict(progress.best_weights)
    return model, progress, evaluate(test), peak.mib


def _note(progress: Progress, metrics: Mapping[str, float], model: nn.Module) -> None:
    """Adds an evaluation, and keeps the weights if its loss is the lowest."""
    progress.evaluations.append({"step": progress.step, **metrics})
    if progress.best is None or metrics["loss"] < progress.evaluations[progress.best]["loss"]:
        progress.best = len(progress.evaluations) - 1
        progress.best_weights = {name: weight.to("cpu", copy=True) for name, weight in model.state_dict().items()}


def _loader(dataset: Dataset, batch_size: int, seed: int | None = None) -> DataLoader:
    """Batches of examples of similar length: shuffled with a seed, else with a column `index`."""
    lengths = pc.list_value_length(dataset.with_format("arrow")[:]["input_ids"]).to_pylist()
    if seed is None:
        dataset = dataset.add_column("index", list(range(len(dataset))))
    return DataLoader(
        dataset,
        batch_sampler=LengthGroupedBatches(lengths, batch_size, seed),
        collate_fn=collate,
        # Its own, because starting an epoch draws a number, which would move the dropout of a resumed run.
        generator=torch.Generator(),
    )


def _steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    loader: DataLoader,
    progress: Progress,
    settings: Mapping[str, Any],
) -> Iterator[None]:
    """Does the rest of an epoch, from batch `progress.batch` on, and yields after every step."""
    losses = []
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for batch in accelerator.skip_first_batches(loader, progress.batch):
        model.train()
        if not losses:  # other columns in every step, the same in a step that is done again
            accelerator.unwrap_model(model).reseed(settings["seed"] + 1_000_003 * (progress.step + 1))
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        progress.batch += 1
        losses.append(loss.detach())
        if not accelerator.sync_gradients:
            continue
        scheduler.step()
        progress.step += 1
        progress.losses.append(accelerator.reduce(torch.stack(losses).mean(), "mean").item())
        losses = []
        if not math.isfinite(progress.losses[-1]):
            raise RuntimeError(f"The loss is {progress.losses[-1]} at step {progress.step}; lower --learning-rate.")
        progress.training_seconds += time.perf_counter() - begin
        progress.training_cpu_seconds += time.process_time() - cpu_begin
        yield
        begin, cpu_begin = time.perf_counter(), time.process_time()


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
