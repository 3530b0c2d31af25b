"""What the fine-tuning scripts share: options, model and attention, batches, training loop, checkpoints, record."""

import argparse
import dataclasses
import hashlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import provenance, write_json
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler
from transformers.trainer_pt_utils import get_length_grouped_indices

import hf_skein
from hf_skein.convert import extend_positions


class InputError(Exception):
    """The data or the options cannot be used; the message says what to change."""


# Arguments


def positive_int(text: str) -> int:
    """An argument that counts something: an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not an integer above 0")
    return value


def fraction(text: str) -> float:
    """An argument from 0 (included) to 1 (excluded)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


def skein_setting(text: str) -> tuple[str, Any]:
    """Parses `key=value` into a field of `SkeinConfig` and its value, which is JSON or else a plain string."""
    key, separator, value = text.partition("=")
    fields = sorted(field.name for field in dataclasses.fields(hf_skein.SkeinConfig))
    if not separator or key not in fields:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value with a key among {', '.join(fields)}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose the pretrained model, its attention and its longest document."""
    group = parser.add_argument_group("model and attention")
    group.add_argument("--model", required=True, help="Hub id or folder of a pretrained encoder")
    group.add_argument(
        "--attn",
        default="skein",
        choices=("skein", "sdpa", "eager", "flash_attention_2"),
        help="attention implementation (default %(default)s)",
    )
    group.add_argument(
        "--max-length", type=positive_int, metavar="N", help="truncate to N tokens (default: what the model takes)"
    )
    group.add_argument(
        "--positions",
        default="tile",
        choices=("tile", "interpolate"),
        help="how to extend a learned position table that is shorter than --max-length (default %(default)s)",
    )
    group.add_argument("--method", help="skein: the sketch, as in SkeinConfig")
    group.add_argument("--num-columns", type=int, metavar="N", help="skein: keys each query attends to exactly")
    group.add_argument("--block-size", type=int, metavar="N", help="skein: queries that share their columns")
    group.add_argument("--min-length", type=int, metavar="N", help="skein: exact attention up to N tokens")
    group.add_argument(
        "--skein",
        type=skein_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="skein: any other field of SkeinConfig, the value as JSON; may be repeated",
    )


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the training loop and of its output."""
    group = parser.add_argument_group("training")

    def number(name: str, kind: Callable, default: float, text: str) -> None:
        group.add_argument(name, type=kind, default=default, metavar="X", help=f"{text} (default %(default)s)")

    number("--epochs", positive_int, 3, "passes over the training documents")
    number("--batch-size", positive_int, 8, "documents per process and forward pass")
    number("--gradient-accumulation-steps", positive_int, 1, "batches per optimizer step")
    number("--learning-rate", float, 5e-5, "peak: after linear warmup, before linear decay")
    number("--warmup-fraction", fraction, 0.1, "warmup as a share of all steps")
    number("--weight-decay", float, 0.01, "of AdamW, for matrices; biases and norms have none")
    number("--max-gradient-norm", float, 1.0, "clip gradients to this norm")
    number("--seed", int, 0, "of new weights, dropout, splits and the order of documents")
    group.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: Accelerate's configuration")
    group.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations to save memory")

    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", type=Path, required=True, help="gets the model, the tokenizer and record.json")
    group.add_argument("--save-every", type=positive_int, metavar="STEPS", help="checkpoint within an epoch, too")
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="start anew in a folder that is not empty")


def start(args: argparse.Namespace) -> Accelerator:
    """Checks the output folder and sets up devices and random numbers.

    Raises:
        InputError: The output folder holds something and neither --resume nor --overwrite was given.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,  # one scheduler step per step, however many processes there are
    )
    folder = args.output_dir
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output-dir {folder} is a file; name a folder.")
    if folder.exists() and any(folder.iterdir()) and not (args.resume or args.overwrite):
        raise InputError(f"--output-dir {folder} is not empty: add --resume or --overwrite, or name another.")
    accelerator.wait_for_everyone()  # before any process fills the folder
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    set_seed(args.seed)
    return accelerator


# Model and batches


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest document, in tokens, that the model's positions allow; `None` if they have no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and kin number tokens from padding_idx + 1, so that many rows of their table are reserved.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit


def load_model(
    auto_class: type, args: argparse.Namespace, **config_fields: Any
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Loads a tokenizer and a pretrained encoder with the attention asked for, ready for `--max-length` tokens.

    Args:
        auto_class: The Auto class of the task, such as `AutoModelForSequenceClassification`.
        args: Parsed options; `args.max_length`, if it was not given, is set to what the model takes.
        **config_fields: Fields of the model's configuration, such as `id2label`.

    Raises:
        InputError: There is no such model, a setting is not allowed, or the model cannot take `--max-length` tokens.
    """
    skein = {name: getattr(args, name) for name in ("method", "num_columns", "block_size", "min_length")}
    skein = {name: value for name, value in skein.items() if value is not None} | dict(args.skein)
    if skein and args.attn != "skein":
        raise InputError(f"--attn {args.attn} has no setting {', '.join(skein)}; that needs --attn skein.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        config = AutoConfig.from_pretrained(args.model, **config_fields)
        if args.attn == "skein":
            # Also without settings, so that the defaults of this version are saved with the model.
            hf_skein.configure(config, **skein)
        # The optimizer needs float32 weights even where the checkpoint is stored in half precision.
        model = auto_class.from_pretrained(
            args.model, config=config, attn_implementation=args.attn, dtype=torch.float32
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"--model {args.model} cannot be used: {error}") from error
    limit = position_limit(model)
    args.max_length = args.max_length or limit
    if args.max_length is None:
        raise InputError(f"--model {args.model} has no longest document of its own; give --max-length.")
    if limit is not None and args.max_length > limit:
        try:
            extend_positions(model, tokenizer, args.max_length, method=args.positions)
        except ValueError as error:
            raise InputError(f"--max-length {args.max_length}: the model takes {limit} tokens. {error}") from error
    tokenizer.model_max_length = args.max_length
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return tokenizer, model


class LengthGroupedBatches:
    """A batch sampler whose batches hold documents of similar length.

    With a seed the documents are shuffled, grouped and the batches shuffled again, as a function of the seed and of
    `epoch` alone; without one the documents come from the longest to the shortest.
    """

    drop_last = False  # read by Accelerate, as `batch_size` is

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int | None = None) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        starts = range(0, len(self.lengths), self.batch_size)
        if self.seed is None:
            order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__, reverse=True)
            return iter([order[start : start + self.batch_size] for start in starts])
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [order[start : start + self.batch_size] for start in starts]
        # An incomplete batch stays last: that is where Accelerate expects it when it shards batches over processes.
        complete = len(self.lengths) // self.batch_size
        shuffled = torch.randperm(complete, generator=generator).tolist()
        return iter([batches[i] for i in shuffled] + batches[complete:])


def make_loader(dataset: Dataset, collator: Callable, batch_size: int, seed: int | None = None) -> DataLoader:
    """Batches of a tokenized dataset: shuffled for training if there is a seed, else with a column `index`."""
    lengths = [len(tokens) for tokens in dataset["input_ids"]]
    if seed is None:
        dataset = dataset.add_column("index", list(range(len(dataset))))
    # A generator of its own, because starting an epoch draws a number, which would move the dropout of a resumed run.
    return DataLoader(
        dataset,
        batch_sampler=LengthGroupedBatches(lengths, batch_size, seed),
        collate_fn=collator,
        generator=torch.Generator(),
    )


# Training


@dataclasses.dataclass
class Progress:
    """How far a run has come. It is part of every checkpoint, the best weights so far included."""

    epoch: int = 0  # complete epochs
    batch: int = 0  # batches of the running epoch that are done
    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)  # one per step
    validation: list[dict[str, float]] = dataclasses.field(default_factory=list)  # one per epoch
    best_epoch: int | None = None
    best_weights: dict[str, torch.Tensor] | None = None
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def fit(
    accelerator: Accelerator,
    model: PreTrainedModel,
    dataset: Dataset,
    collator: Callable,
    evaluate: Callable[[nn.Module], dict[str, float]],
    metric: str,
    args: argparse.Namespace,
    settings: Mapping[str, Any],
) -> tuple[nn.Module, Progress]:
    """Trains, with an evaluation and a checkpoint after every epoch; continues from a checkpoint under `--resume`.

    Args:
        accelerator: From `start`.
        model: Returns its loss when it is given a batch.
        dataset: Tokenized training data.
        collator: Makes a batch of rows of it.
        evaluate: Validation metrics of a model.
        metric: The name, among them, of the one the best epoch is chosen by; higher is better.
        args: The options of `add_training_arguments`.
        settings: All that determines the run, as JSON: a run is continued only under the same.

    Returns:
        The model as Accelerate prepared it, with the weights of the best epoch, and the progress at the end.

    Raises:
        InputError: The run to resume had other settings.
        RuntimeError: The loss is not finite.
    """
    folder = args.output_dir / "checkpoints"
    if args.resume:
        _check_same_run(folder, settings)
    loader = make_loader(dataset, collator, args.batch_size, args.seed)
    batches = loader.batch_sampler
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = args.epochs * math.ceil(len(loader) / args.gradient_accumulation_steps)
    scheduler = accelerator.prepare(get_scheduler("linear", optimizer, round(args.warmup_fraction * steps), steps))
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    set_seed(args.seed, device_specific=True)  # another dropout on every process
    if args.resume and load_checkpoint(accelerator, folder) is None:
        accelerator.print("There is no checkpoint to resume from; starting anew.")
    if accelerator.is_main_process:
        if not args.resume:
            shutil.rmtree(folder, ignore_errors=True)
            (args.output_dir / "record.json").unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)
    accelerator.wait_for_everyone()

    bar = tqdm(total=steps, initial=progress.step, unit="step", disable=not accelerator.is_main_process)
    while progress.epoch < args.epochs:
        batches.epoch = progress.epoch
        _train_epoch(accelerator, model, optimizer, scheduler, loader, progress, args, bar)
        begin = time.perf_counter()
        metrics = evaluate(model)
        progress.evaluation_seconds += time.perf_counter() - begin
        progress.epoch += 1
        progress.batch = 0
        progress.validation.append(metrics)
        accelerator.print(f"epoch {progress.epoch}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        if progress.best_epoch is None or metrics[metric] > progress.validation[progress.best_epoch - 1][metric]:
            progress.best_epoch = progress.epoch
            weights = accelerator.unwrap_model(model).state_dict()
            progress.best_weights = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
        save_checkpoint(accelerator, folder, progress.step)
    bar.close()
    accelerator.unwrap_model(model).load_state_dict(progress.best_weights)
    return model, progress


def _train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    loader: DataLoader,
    progress: Progress,
    args: argparse.Namespace,
    bar: tqdm,
) -> None:
    """The rest of an epoch, from batch `progress.batch` on."""
    model.train()
    losses = []
    begin = time.perf_counter()
    for batch in accelerator.skip_first_batches(loader, progress.batch):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
        progress.batch += 1
        losses.append(loss.detach())
        if not accelerator.sync_gradients:
            continue
        scheduler.step()
        progress.step += 1
        step_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        losses = []
        if not math.isfinite(step_loss):
            raise RuntimeError(
                f"The loss is {step_loss} at step {progress.step}: lower --learning-rate, or use bf16 instead of fp16."
            )
        progress.losses.append(step_loss)
        progress.training_seconds += time.perf_counter() - begin
        bar.update()
        bar.set_postfix(epoch=progress.epoch + 1, loss=f"{step_loss:.4f}")
        # After the last batch of an epoch the checkpoint waits for the evaluation.
        if args.save_every and progress.step % args.save_every == 0 and progress.batch < len(loader):
            save_checkpoint(accelerator, args.output_dir / "checkpoints", progress.step)
        begin = time.perf_counter()


# Checkpoints: folders `step-XXXXXXXX` of `accelerator.save_state` with the digest of every file


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int = 2) -> None:
    """Saves everything a run needs to continue, complete or not at all, and deletes all but the last `keep`."""
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / "sha256.json", _digests(partial))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        kept = [path for path in _checkpoints(folder) if path.name <= final.name][-keep:]
        for path in set(_checkpoints(folder)) - set(kept):
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> Path | None:
    """Restores the last complete checkpoint; returns its folder, or `None` if there is none."""
    for path in reversed(_checkpoints(folder)):
        # Digests are compared before anything is loaded: a bad file must not leave the model half overwritten.
        try:
            expected = json.loads((path / "sha256.json").read_text())
            damaged = sorted(name for name, digest in expected.items() if digest != _sha256(path / name))
        except (OSError, ValueError) as error:
            damaged = [f"{type(error).__name__}"]
        if not damaged:
            accelerator.load_state(str(path))
            accelerator.print(f"Resuming from {path.name}.")
            return path
        accelerator.print(f"Skipping the checkpoint {path.name}: it is incomplete or damaged ({', '.join(damaged)}).")
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _check_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "settings.json"
    if not path.exists():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    changed = [
        f"{name} (was {before.get(name)}, now {value})"
        for name, value in now.items()
        if value != before.get(name) and name not in ("output_dir", "resume", "overwrite", "save_every")
    ]
    if changed:
        raise InputError(
            f"--resume continues the same run, but these differ: {', '.join(changed)}. Or use --overwrite."
        )


# The record


def public_settings(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """The options as plain JSON; a path is reduced to its last part, since the rest tells about the machine alone."""
    settings = {}
    for name, value in vars(args).items():
        is_path = isinstance(value, Path) or (isinstance(value, str) and Path(value).exists())
        settings[name] = Path(value).resolve().name if is_path else value
    return settings | {"mixed_precision": accelerator.mixed_precision, "processes": accelerator.num_processes}


def run_record(settings: Mapping[str, Any], model: PreTrainedModel, progress: Progress) -> dict[str, Any]:
    """What every script records about a run: settings, versions, hardware, commit, losses, time and memory."""
    return {
        "settings": dict(settings),
        "skein": getattr(model.config, "skein", None),
        **provenance("transformers", "accelerate", "datasets", "hf-skein"),
        "losses": progress.losses,
        "validation": progress.validation,
        "best_epoch": progress.best_epoch,
        "training_seconds": progress.training_seconds,
        "evaluation_seconds": progress.evaluation_seconds,
        "peak_memory_mib": peak_memory_mib(),
    }


def save_run(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> None:
    """Writes the model, the tokenizer and record.json, which is last and so tells that the run is complete."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "record.json", record)


def peak_memory_mib() -> float:
    """Most memory this process has held: on the GPU if there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
