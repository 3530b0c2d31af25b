"""The training loop: documents of every step, the loss of all of them, evaluations, early stopping, checkpoints."""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from _checkpoints import is_complete, load_best, load_checkpoint, save_checkpoint
from _data import InputError, Row
from _record import write_json
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from datasets import Dataset, IterableDataset
from torch import nn
from tqdm.auto import tqdm
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_length_grouped_indices


Batch = dict[str, Any]
Metrics = dict[str, float]


class Objective(Protocol):
    """What a task tells the training loop."""

    best_metric: str

    def collate(self, rows: list[Row]) -> Batch:
        """A batch of encoded rows."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """What the model returns for a batch; its `loss` is a mean over `weight(batch)` terms."""

    def weight(self, batch: Batch) -> int:
        """How many terms the loss of a batch is a mean of: its documents, or its tokens with a label."""

    def results(self, output: Any, batch: Batch) -> list[Any]:
        """What an evaluation keeps of each row: plain Python or NumPy."""


# The documents of a step


def length_grouped_steps(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """All documents in random groups of similar length, `size` of them but for the last, each the longest first.

    They are a function of the arguments alone, so that neither the number of processes nor a resumption matters.
    """
    state = np.random.SeedSequence([seed, epoch]).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    order = get_length_grouped_indices(lengths, size, generator=generator)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    complete = len(order) // size
    shuffled = torch.randperm(complete, generator=generator).tolist()
    groups = [groups[i] for i in shuffled] + groups[complete:]
    return [sorted(group, key=lengths.__getitem__, reverse=True) for group in groups]


class TableSteps:
    """The documents of one step after the other, from a dataset in memory, epoch after epoch.

    Args:
        dataset: Encoded rows.
        size: Documents per step, over all processes.
        seed: Of their order.

    Attributes:
        read: What was counted of a stream; nothing, here.
    """

    read: Mapping[str, int] = {}

    def __init__(self, dataset: Dataset, size: int, seed: int) -> None:
        self._dataset = dataset
        self._lengths = [len(tokens) for tokens in dataset["input_ids"]]
        self._size = size
        self._seed = seed
        self._epoch = self._taken = 0
        self._plan: list[list[int]] | None = None

    def __len__(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self._lengths) / self._size)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._epoch + self._taken / len(self)

    def __iter__(self) -> Iterator[list[Row]]:
        return self

    def __next__(self) -> list[Row]:
        if self._plan is None:
            self._plan = length_grouped_steps(self._lengths, self._size, self._seed, self._epoch)
        rows = [self._dataset[i] for i in self._plan[self._taken]]
        self._taken += 1
        if self._taken == len(self):
            self._epoch, self._taken, self._plan = self._epoch + 1, 0, None
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._taken, self._plan = state["epoch"], state["taken"], None


class StreamSteps:
    """The documents of one step after the other, from a stream that starts again at its end.

    A buffer of at least so many steps is filled, and its documents are grouped by length as those of an epoch are.
    Every process reads all of it, so that neither their number nor a resumption changes a step.

    Args:
        stream: Raw rows.
        prepare: Encodes raw rows, each as one or several; its second argument is the number of the first of them
            within the stream.
        count: What is to be counted of encoded rows.
        size: Documents per step, over all processes.
        seed: Of their order within a buffer.
        buffer: Steps per buffer.

    Attributes:
        read: The counts of all buffers so far.
    """

    def __init__(
        self,
        stream: IterableDataset,
        prepare: Callable[[list[Row], int], list[Row]],
        count: Callable[[list[Row]], Mapping[str, int]],
        size: int,
        seed: int,
        buffer: int,
    ) -> None:
        self._stream = stream
        self._prepare = prepare
        self._count = count
        self._size = size
        self._seed = seed
        self._buffer = buffer
        self._beginning = copy.deepcopy(stream.state_dict())
        self._state = {"stream": self._beginning, "passes": 0, "row": 0, "read": {}, "buffer": 0, "taken": 0}
        self._steps: list[list[Row]] = []
        self._open()

    @property
    def epoch(self) -> float:
        """Complete passes over the data by the end of this buffer."""
        return self._passes

    def __iter__(self) -> Iterator[list[Row]]:
        return self

    def __next__(self) -> list[Row]:
        if self._state["taken"] == len(self._steps):
            self.advance()
        step = self._steps[self._state["taken"]]
        self._state["taken"] += 1
        return step

    def advance(self) -> None:
        """Fills the next buffer; before the first step, so that bad data are found early."""
        self._state = {
            "stream": copy.deepcopy(self._stream.state_dict()),
            "passes": self._passes,
            "row": self._row,
            "read": self.read,
            "buffer": self._state["buffer"] + 1,
            "taken": 0,
        }
        self._fill()

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = copy.deepcopy(dict(state))
        self._open()
        if self._state["buffer"]:
            self._fill()

    def _open(self) -> None:
        """Goes to where the present buffer begins."""
        self._passes, self._row, self.read = (self._state[name] for name in ("passes", "row", "read"))
        self._stream.load_state_dict(self._state["stream"])
        self._rows = iter(self._stream)

    def _fill(self) -> None:
        rows: list[Row] = []
        while len(rows) < self._size * self._buffer:
            # Few at a time: a row can become many.
            number, wanted = self._row, min(self._size, self._size * self._buffer - len(rows))
            raw = list(itertools.islice(self._rows, wanted))
            self._row += len(raw)
            if self._row == 0:
                raise InputError("The stream of training documents is empty.")
            if raw:
                found = self._prepare(raw, number)
                counted = self._count(found)
                self.read = {name: self.read.get(name, 0) + more for name, more in counted.items()}
                rows += found
            if len(raw) < wanted:
                self._passes, self._row = self._passes + 1, 0
                self._stream.load_state_dict(self._beginning)
                self._rows = iter(self._stream)
        lengths = [len(row["input_ids"]) for row in rows]
        plan = length_grouped_steps(lengths, self._size, self._seed, self._state["buffer"])
        self._steps = [[rows[i] for i in group] for group in plan]


def own_batches(rows: list[Row], batch_size: int, processes: int, rank: int) -> list[tuple[list[Row], bool]]:
    """The batches that a process has of a step's documents, and whether they count.

    All processes get the same number of batches, of about the same number of tokens. One that is left without a
    document gets one that does not count.
    """
    batches = []
    for start in range(0, len(rows), batch_size * processes):
        shared = rows[start : start + batch_size * processes]
        own = shared[rank::processes]
        batches.append((own or shared[:1], bool(own)))
    return batches


# Training


@dataclasses.dataclass
class Progress:
    """How far a run has come. It is part of every checkpoint."""

    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)  # one per step
    validation: list[Metrics] = dataclasses.field(default_factory=list)  # with `step` and `epoch`
    best_step: int = 0  # 0: there was no evaluation yet
    read: dict[str, int] = dataclasses.field(default_factory=dict)  # of a stream: documents, and what is counted
    training_seconds: float = 0.0
    training_cpu_seconds: float = 0.0  # of this process, all its threads together
    evaluation_seconds: float = 0.0

    def since_best(self) -> int:
        """Evaluations after the best one."""
        return sum(metrics["step"] > self.best_step for metrics in self.validation)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def fit(
    accelerator: Accelerator,
    task: Objective,
    model: nn.Module,
    steps: TableSteps | StreamSteps,
    evaluate: Callable[[nn.Module], Metrics],
    args: argparse.Namespace,
    settings: Mapping[str, Any],
) -> tuple[nn.Module, Progress]:
    """Trains, with evaluations and checkpoints; continues from a checkpoint under `--resume`.

    Args:
        accelerator: From `start`.
        task: Its `best_metric` chooses the best evaluation: the higher the better, but the lower for a `loss`.
        model: Is trained where its parameters require gradients.
        steps: The documents of every step.
        evaluate: Validation metrics of a model.
        args: The options of `add_training_arguments`.
        settings: All that determines the run, as JSON, for `check_same_run`.

    Returns:
        The model as Accelerate prepared it, with the weights of the best evaluation, and the progress at the end.

    Raises:
        InputError: All checkpoints to resume from are damaged, or the loss is not finite.
    """
    folder = args.output_dir / "checkpoints"
    total = args.max_steps or args.epochs * len(steps)
    evaluate_every = args.evaluate_every or (len(steps) if isinstance(steps, TableSteps) else total)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=args.learning_rate)
    scheduler = get_scheduler("linear", optimizer, round(args.warmup_fraction * total), total)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)  # DeepSpeed wants them together
    progress = Progress()
    accelerator.register_for_checkpointing(progress, steps)
    set_seed(args.seed, device_specific=True)  # another dropout on every process
    if args.resume and load_checkpoint(accelerator, folder) is None:
        accelerator.print("There is no checkpoint to resume from; starting anew.")
    if progress.best_step and not is_complete(folder, progress.best_step):
        accelerator.print(f"The best checkpoint, step {progress.best_step}, is lost; this one takes its place.")
        progress.best_step = progress.step
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)
    accelerator.wait_for_everyone()

    bar = tqdm(total=total, initial=progress.step, unit="step", disable=not accelerator.is_main_process)
    while progress.step < total and (args.patience is None or progress.since_best() < args.patience):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        loss = _train_step(accelerator, task, model, optimizer, next(steps), args)
        progress.read = dict(steps.read)
        rate = scheduler.get_last_lr()[0]
        scheduler.step()
        progress.step += 1
        if not math.isfinite(loss):
            raise InputError(
                f"The loss is {loss} at step {progress.step}: lower --learning-rate, or use bf16 instead of fp16, and "
                "start anew with --overwrite."
            )
        progress.losses.append(loss)
        progress.training_seconds += time.perf_counter() - begin
        progress.training_cpu_seconds += time.process_time() - cpu_begin
        accelerator.log({"loss": loss, "learning_rate": rate}, step=progress.step)
        bar.update()
        bar.set_postfix(epoch=f"{steps.epoch:.2f}", loss=f"{loss:.4f}")
        is_evaluated = progress.step % evaluate_every == 0 or progress.step == total
        if is_evaluated:
            begin = time.perf_counter()
            _evaluate(accelerator, evaluate(model), task.best_metric, progress, steps.epoch)
            progress.evaluation_seconds += time.perf_counter() - begin
        if is_evaluated or (args.save_every and progress.step % args.save_every == 0):
            save_checkpoint(accelerator, folder, progress.step, progress.best_step)
    bar.close()
    if progress.step < total:
        accelerator.print(f"Stopping early: {args.patience} evaluations without a better {task.best_metric}.")
    done = copy.deepcopy(progress)  # the best checkpoint has less of it
    if done.best_step != done.step:
        load_best(accelerator, folder, done.best_step)
    return model, done


def _train_step(
    accelerator: Accelerator,
    task: Objective,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
    args: argparse.Namespace,
) -> float:
    """One step; returns the mean loss over all its terms, however these are spread over batches and processes."""
    model.train()
    processes = accelerator.num_processes
    batches = own_batches(rows, args.batch_size, processes, accelerator.process_index)
    inputs = [task.collate(own) for own, _ in batches]
    weights = [task.weight(batch) * counts for batch, (_, counts) in zip(inputs, batches, strict=True)]
    terms = accelerator.reduce(torch.tensor(sum(weights), device=accelerator.device), "sum").item()
    step_loss = torch.zeros((), device=accelerator.device)
    for i, (batch, weight) in enumerate(zip(inputs, weights, strict=True)):
        accelerator.sync_gradients = i == len(inputs) - 1
        with contextlib.nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
            loss = task.forward(model, send_to_device(batch, accelerator.device)).loss
            if weight == 0:
                loss = loss.nan_to_num()  # a mean of nothing
            loss = loss * (weight / max(terms, 1) * processes)  # gradients become means over processes
            accelerator.backward(loss)
        step_loss += loss.detach()
    accelerator.clip_grad_norm_(model.parameters(), args.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(step_loss, "mean").item()


def _evaluate(accelerator: Accelerator, metrics: Metrics, best_metric: str, progress: Progress, epoch: float) -> None:
    """Records an evaluation, and whether it is the best one."""
    sign = -1 if best_metric.endswith("loss") else 1
    best = [earlier[best_metric] for earlier in progress.validation if earlier["step"] == progress.best_step]
    if not best or sign * metrics[best_metric] > sign * best[0]:
        progress.best_step = progress.step
    progress.validation.append({"step": progress.step, "epoch": epoch, **metrics})
    accelerator.print(f"step {progress.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
    accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=progress.step)


@torch.no_grad()
def predict(
    accelerator: Accelerator, task: Objective, model: nn.Module, dataset: Dataset, batch_size: int
) -> list[Any]:
    """The results of every row of an encoded dataset, in its order, on every process."""
    model.eval()
    lengths = [len(tokens) for tokens in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found = []
    rounds = range(0, len(batches), accelerator.num_processes)
    for begin in tqdm(rounds, unit="batch", leave=False, disable=not accelerator.is_main_process):
        mine = begin + accelerator.process_index
        rows = batches[min(mine, len(batches) - 1)]  # none may stand aside: a sharded model needs all processes
        batch = send_to_device(task.collate([dataset[i] for i in rows]), accelerator.device)
        results = task.results(task.forward(model, batch), batch)
        if mine < len(batches):
            found += zip(rows, results, strict=True)
    return [result for _, result in sorted(gather_object(found), key=lambda pair: pair[0])]
