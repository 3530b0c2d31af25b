"""What the fine-tuning scripts share: the task, the model and its attention, LoRA, the run from data to record.

A script defines a `Task` and calls `run_script` with it. Reading is in `_data`, options in `_options`, the loop in
`_training`, metrics in `_metrics`.
"""

import argparse
import hashlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _checkpoints import check_same_run
from _data import PARTS, InputError, Reader, Row, add_data_arguments, split_rows
from _options import add_model_arguments, add_training_arguments, check_options, skein_settings
from _record import origin, provenance, write_json
from _training import Batch, Metrics, Progress, StreamSteps, TableSteps, fit, predict
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_skein
from hf_skein.convert import extend_positions
from hf_skein.hub import HubError, push


ENCODED_AT_ONCE = 256  # documents


class Task:
    """What a script adds to a run. The defaults suit a model that is given text and returns its loss.

    Attributes:
        description: For `--help`: what the script does, and examples.
        auto_class: The Auto class of the model.
        columns: What a row has to have, and what that is, for `--help`; each gets an option `--NAME-column`.
        best_metric: The validation metric that chooses the best checkpoint: the higher the better, but the lower if its
            name ends in `loss`.
        lora_task: Its name in peft (`"SEQ_CLS"`, ...), by which peft knows the head, which is trained fully.
        batches_add_up: Whether the losses of two batches are together that of one twice as large.
        validates_first: Whether the validation metrics are recorded before training, too, as those of step 0.
        args: The options.
        tokenizer: Set when the model is loaded, before `encode`.
    """

    description: str
    auto_class: type
    columns: Mapping[str, str] = {"text": "text"}
    best_metric = "loss"
    lora_task: str | None = None
    batches_add_up: bool = True
    validates_first: bool = False

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer: PreTrainedTokenizerBase

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds the options that this task alone has."""

    def check(self, row: Row) -> Row:
        """A row (`name` and the columns) as the task needs it.

        Raises:
            ValueError: It is bad; the message ends the sentence "1 of 3 documents ...".
        """
        return check_text(row, "text")

    def stratum(self, row: Row) -> str:
        """Parts and subsets are stratified by this."""
        return ""

    def prepare(self, parts: Mapping[str, Dataset]) -> dict[str, Any]:
        """Looks at all the rows, with no `train` among them when it is a stream; returns fields of the model's config.

        Raises:
            InputError: The rows do not fit together.
        """
        return {}

    def load_model(self, **config_fields: Any) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """The tokenizer, and the model with these fields in its configuration; pretrained, hence always the same."""
        return load_model(self.auto_class, self.args, **config_fields)

    def encode(self, rows: Sequence[Row]) -> list[Row]:
        """The model's inputs for each row, cut to `args.max_length`, and `length`, the tokens before that."""
        texts = [row["text"] for row in rows]
        lengths = [len(tokens) for tokens in self.tokenizer(texts, verbose=False)["input_ids"]]
        inputs = self.tokenizer(texts, truncation=True, max_length=self.args.max_length)
        return [
            {**{name: values[i] for name, values in inputs.items()}, "length": length}
            for i, length in enumerate(lengths)
        ]

    def counts(self, encoded: Sequence[Row] | Dataset) -> dict[str, int]:
        """What else is to be said about encoded documents, besides how many are truncated."""
        return {}

    def collate(self, rows: Sequence[Row]) -> Batch:
        """A batch of encoded rows, padded."""
        rows = [{name: value for name, value in row.items() if name != "length"} for row in rows]
        return DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=self.padding_multiple)(rows)

    @property
    def padding_multiple(self) -> int | None:
        """8, which GPUs like, unless that would go past the last position."""
        return 8 if self.args.max_length % 8 == 0 else None

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """What the model returns for a batch; its `loss` is a mean over `weight(batch)` terms."""
        return model(**batch)

    def weight(self, batch: Batch) -> int:
        """How many terms the loss of a batch is a mean of."""
        return len(batch["input_ids"])

    def results(self, output: Any, batch: Batch) -> list[Any]:
        """What an evaluation keeps of each row: plain Python or NumPy."""
        raise NotImplementedError

    def metrics(self, results: list[Any], rows: Dataset, encoded: Dataset) -> Metrics:
        """Metrics of the results of all rows; among them `best_metric`."""
        raise NotImplementedError

    def predictions(self, results: list[Any], rows: Dataset, encoded: Dataset) -> list[Row]:
        """What test_predictions.jsonl says of each row."""
        return []

    def record(self) -> dict[str, Any]:
        """What record.json gets besides settings, losses and metrics."""
        return {}


def check_text(row: Row, *columns: str) -> Row:
    """`row`, if it has text in these columns.

    Raises:
        ValueError: It has not.
    """
    for column in columns:
        if not (isinstance(row[column], str) and row[column].strip()):
            raise ValueError(f"have no {column}")
    return row


def label_order(names: Iterable[str]) -> list[str]:
    """Names of labels in the order in which they are numbered: "10" comes after "9"."""
    return sorted(names, key=lambda name: (int(name) if name.isdecimal() else math.inf, name))


def make_parser(task_class: type[Task]) -> argparse.ArgumentParser:
    """The command line of a script."""
    parser = argparse.ArgumentParser(
        description=task_class.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --model MODEL --dataset DATASET --output-dir FOLDER [options]",
    )
    task_class.add_arguments(parser)
    add_data_arguments(parser, task_class.columns)
    add_model_arguments(parser)
    add_training_arguments(parser)
    return parser


def start(args: argparse.Namespace) -> Accelerator:
    """Sets up devices and random numbers."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes on CPUs would not find each other
        mixed_precision=args.mixed_precision,
        step_scheduler_with_optimizer=False,  # one scheduler step per step, however many processes there are
        log_with=args.tracker,
        project_config=ProjectConfiguration(str(args.output_dir), logging_dir=str(args.output_dir / "logs")),
    )
    if accelerator.state.deepspeed_plugin is not None:  # it is not given a DataLoader to learn this from
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.batch_size
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = args.max_gradient_norm
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed-precision fp16 needs a GPU; on a CPU use bf16.")
    accelerator.wait_for_everyone()  # before any process fills the folder
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    set_seed(args.seed)
    return accelerator


# Model


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

    Returns:
        The tokenizer, and the model; its `new_modules` are the names of those with weights that the checkpoint lacks.

    Raises:
        InputError: There is no such model, a setting is not allowed, or the model cannot take `--max-length` tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        config = AutoConfig.from_pretrained(args.model, **config_fields)
        if args.attn == "skein":
            # Also without settings, so that the defaults of this version are saved with the model.
            hf_skein.configure(config, **skein_settings(args))
        # The optimizer needs float32 weights even where the checkpoint is stored in half precision. A head that does
        # not fit the labels is replaced.
        model, info = auto_class.from_pretrained(
            args.model,
            config=config,
            attn_implementation=args.attn,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"--model {args.model} cannot be used: {error}") from error
    damaged = [key for key, *_ in info["mismatched_keys"] if key.startswith(f"{model.base_model_prefix}.")]
    if damaged:
        raise InputError(f"--model {args.model} cannot be used: its {damaged[0]} does not fit its configuration.")
    model.new_modules = sorted({key.rpartition(".")[0] for key in info["missing_keys"]})
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
        if not model.supports_gradient_checkpointing:
            raise InputError(f"--gradient-checkpointing: {type(model).__name__} does not support it.")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return tokenizer, model


def add_lora(model: PreTrainedModel, task: Task, args: argparse.Namespace) -> PeftModel:
    """The model with adapters, which are trained, as are a head of labels and all weights that the checkpoint lacks.

    Raises:
        InputError: peft does not know where to put them, or weights that are new are also those of the embeddings.
    """
    targets, rank = args.lora_target_modules, args.lora_rank or 8
    embeddings = model.get_input_embeddings().weight
    if any(weight is embeddings for name in model.new_modules for weight in model.get_submodule(name).parameters()):
        raise InputError(
            f"--lora: --model {args.model} lacks the head, which shares the embeddings that adapters leave alone. "
            "Train the head first, without --lora."
        )
    new = [name for name in model.new_modules if all(p.requires_grad for p in model.get_submodule(name).parameters())]
    frozen = [
        name
        for name, module in model.named_modules()
        if name and not any(parameter.requires_grad for parameter in module.parameters())
    ]
    config = LoraConfig(
        task_type=task.lora_task,
        r=rank,
        lora_alpha=args.lora_alpha or 2 * rank,
        lora_dropout=args.lora_dropout or 0.0,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        exclude_modules=frozen or None,  # of no use to the task, such as the pooler to a mean
        modules_to_save=new or None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"--lora: {error} Give --lora-target-modules.") from error


# The run


def finetune(task_class: type[Task], argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, tests, saves and pushes as the command line says; returns the record.

    Raises:
        InputError: The data or the options cannot be used, or memory is too small; the message says what to change.
    """
    args = make_parser(task_class).parse_args(argv)
    check_options(args)
    try:
        return _run(task_class(args), args)
    except torch.OutOfMemoryError as error:
        raise InputError(f"Out of memory. {_less_memory(task_class, args)} ({error})") from error
    except RuntimeError as error:  # what PyTorch raises on a CPU
        if "can't allocate memory" not in str(error):
            raise
        raise InputError(f"Out of memory. {_less_memory(task_class, args)} ({error})") from error


def _less_memory(task_class: type[Task], args: argparse.Namespace) -> str:
    factor = args.gradient_accumulation_steps
    ways = []
    if args.batch_size > 1:
        smaller = f"--batch-size {args.batch_size // 2}"
        if task_class.batches_add_up:
            smaller += f" --gradient-accumulation-steps {factor * 2} (the same steps, in smaller batches)"
        ways.append(smaller)
    if not args.gradient_checkpointing:
        ways.append("--gradient-checkpointing")
    if args.mixed_precision in (None, "no"):
        ways.append("--mixed-precision bf16")
    if not args.lora:
        ways.append("--lora")
    ways.append(f"a --max-length below {args.max_length}")
    return f"Less of it take: {', '.join(ways)}. Start anew with --overwrite."


def _run(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    accelerator = start(args)
    columns = {name: getattr(args, f"{name}_column") for name in task.columns}
    reader = Reader(columns, task.check, args.dataset_config)
    rows = split_rows(args, reader, task.stratum)
    fields = task.prepare(rows)
    task.tokenizer, model = task.load_model(**fields)
    encoded = {part: encode(task, documents) for part, documents in rows.items()}
    lengths = {
        part: length_statistics(documents["length"], args.max_length) | task.counts(documents)
        for part, documents in encoded.items()
    }
    for part, found in lengths.items():
        check_lengths(args, found, f"{part} documents")
        say_counts(accelerator, part, found)
    size = args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.streaming:
        steps = stream_steps(task, args, reader, size)
        if not args.resume:
            steps.advance()  # before anything is deleted or written
    else:
        steps = TableSteps(encoded["train"], size, args.seed)
    digests = {"data_sha256": _digest(rows), "model_sha256": _digest_of_weights(model)}
    if args.streaming and Path(args.dataset).is_file():
        digests["stream_bytes"] = Path(args.dataset).stat().st_size
    if args.lora:
        model = add_lora(model, task, args)
    settings = public_settings(args, accelerator) | digests
    if args.resume:
        check_same_run(args.output_dir / "checkpoints", settings)
    else:
        if accelerator.is_main_process:
            clear_output(args.output_dir)
        accelerator.wait_for_everyone()
    if args.tracker:
        plain = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("finetuning", plain)

    def evaluate(model: nn.Module, part: str) -> tuple[Metrics, list[Any]]:
        results = predict(accelerator, task, model, encoded[part], args.batch_size)
        return task.metrics(results, rows[part], encoded[part]), results

    before = []
    if task.validates_first:
        with accelerator.autocast():
            metrics, _ = evaluate(model.to(accelerator.device), "validation")
        before = [{"step": 0, "epoch": 0.0, **metrics}]
    model, progress = fit(
        accelerator, task, model, steps, lambda model: evaluate(model, "validation")[0], args, settings
    )
    if args.streaming:
        lengths["train"] = progress.read
        say_counts(accelerator, "train", progress.read)
    record = {**run_record(settings, model, progress), "lengths": lengths, **task.record()}
    record["validation"] = before + record["validation"]
    predictions = None
    if "test" in rows:
        begin = time.perf_counter()
        metrics, results = evaluate(model, "test")
        record["test"] = metrics | {"seconds": time.perf_counter() - begin}
        accelerator.print("test: " + ", ".join(f"{name} {value:.4f}" for name, value in record["test"].items()))
        accelerator.log({f"test/{name}": value for name, value in metrics.items()}, step=progress.step)
        predictions = task.predictions(results, rows["test"], encoded["test"])
    save_weights(accelerator, task, model, args, fields)
    if accelerator.is_main_process:
        save_record(args.output_dir, record, predictions)
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        try:
            push(args.output_dir, args.push_to_hub, private=args.private)
        except HubError as error:
            raise InputError(f"{args.output_dir} is complete, but was not pushed. {error}") from error
    return record


def run_script(task_class: type[Task]) -> None:
    """What a script does when it is run as a program: an `InputError` is a message and status 1."""
    try:
        finetune(task_class)
    except InputError as error:
        sys.exit(f"error: {error}")


# Encoded documents


def encode(task: Task, rows: Dataset) -> Dataset:
    """The rows as the task encodes them."""
    parts, features = [], None
    for start in range(0, len(rows), ENCODED_AT_ONCE):
        batch = rows.select(range(start, min(start + ENCODED_AT_ONCE, len(rows))))
        parts.append(Dataset.from_list(task.encode(list(batch)), features=features))
        features = parts[0].features
    return concatenate_datasets(parts)


def stream_steps(task: Task, args: argparse.Namespace, reader: Reader, size: int) -> StreamSteps:
    """The steps of `--streaming`."""
    stream = reader.stream(args.dataset, args.train_split)

    def prepare(raw: list[Row], first: int) -> list[Row]:
        encoded = task.encode(reader.checked(raw, args.dataset, stream.features, first))
        check_lengths(args, count(encoded), f"training documents from number {first} on")
        return encoded

    def count(encoded: list[Row]) -> dict[str, int]:
        truncated = sum(row["length"] > args.max_length for row in encoded)
        return {"documents": len(encoded), "truncated": truncated, **task.counts(encoded)}

    return StreamSteps(stream, prepare, count, size, args.seed, args.stream_buffer)


def length_statistics(lengths: Sequence[int], max_length: int) -> dict[str, float]:
    """Of the lengths of documents in tokens, before truncation."""
    lengths = np.array(lengths)
    return {
        "documents": len(lengths),
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "max": int(lengths.max()),
        "truncated": int((lengths > max_length).sum()),
    }


def check_lengths(args: argparse.Namespace, found: Mapping[str, float], what: str) -> None:
    """Holds the number of truncated documents against `--too-long`.

    Raises:
        InputError: There are some, and it is `error`.
    """
    if found["truncated"] and args.too_long == "error":
        raise InputError(
            f"{found['truncated']} of {found['documents']} {what} have more than {args.max_length} tokens"
            + (f", the longest {found['max']}" if "max" in found else "")
            + "; raise --max-length, or give --too-long truncate."
        )


def say_counts(accelerator: Accelerator, part: str, found: Mapping[str, float]) -> None:
    """Says how many documents are truncated, and what else was counted."""
    for name, count in found.items():
        if count and name not in ("documents", "min", "median", "mean", "max"):
            accelerator.print(f"{part}: {count} of {found['documents']} documents, {name.replace('_', ' ')}.")


# What is left


def public_settings(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """The options as plain JSON; a path is reduced to its last part, since the rest tells about the machine alone."""
    settings = {}
    for name, value in vars(args).items():
        is_path = isinstance(value, Path) or (isinstance(value, str) and Path(value).exists())
        settings[name] = Path(value).resolve().name if is_path else value
    return settings | {"mixed_precision": accelerator.mixed_precision, "processes": accelerator.num_processes}


def run_record(settings: Mapping[str, Any], model: nn.Module, progress: Progress) -> dict[str, Any]:
    """What every script records about a run: settings, versions, hardware, commit, losses, time and memory."""
    return {
        "settings": dict(settings),
        "skein": getattr(getattr(model, "module", model).config, "skein", None),
        "parameters": {
            "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            "all": sum(parameter.numel() for parameter in model.parameters()),
        },
        **provenance("transformers", "accelerate", "datasets", "peft", "hf-skein"),
        "losses": progress.losses,
        "validation": progress.validation,
        "best_step": progress.best_step,
        "training_seconds": progress.training_seconds,
        "training_cpu_seconds": progress.training_cpu_seconds,
        "evaluation_seconds": progress.evaluation_seconds,
        "peak_memory_mib": peak_memory_mib(),
    }


def clear_output(folder: Path) -> None:
    """Deletes what an earlier run wrote, so that nothing of it is taken for a result of this one."""
    for name in ("checkpoints", "logs", "adapter", "base"):
        # Away at once, so that a kill leaves no half of it that a later --resume would take for its own.
        deleted = folder / f"{name}.deleted"
        if deleted.exists():
            shutil.rmtree(deleted)
        if (folder / name).exists():
            shutil.rmtree((folder / name).rename(deleted))
    for name in ("record.json", "learning_curve.png", "test_predictions.jsonl", "config.json", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)


def save_weights(
    accelerator: Accelerator, task: Task, model: nn.Module, args: argparse.Namespace, fields: Mapping[str, Any]
) -> None:
    """Writes the model and the tokenizer; every process has to call it.

    With LoRA the adapters go to `adapter`, and what they belong to, the extended position table included, to `base`;
    or, merged with them, to where a model without LoRA goes.
    """
    folder = args.output_dir
    weights = accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model)
    if not args.lora:
        unwrapped.save_pretrained(
            folder,
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=weights,
        )
    elif accelerator.is_main_process:
        unwrapped.peft_config["default"].base_model_name_or_path = public_settings(args, accelerator)["model"]
        unwrapped.save_pretrained(folder / "adapter", state_dict=weights, save_embedding_layers=False)
        # Loaded again, as a user would: what is written is known to be whole, and the model may be sharded.
        _, base = task.load_model(**fields)
        if args.lora_merge:
            PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(folder)
        else:
            base.save_pretrained(folder / "base")
    if accelerator.is_main_process:
        task.tokenizer.save_pretrained(folder)


def save_record(folder: Path, record: dict[str, Any], predictions: list[Row] | None) -> None:
    """Writes predictions, picture and record.json, which is last and so tells that the run is complete."""
    if predictions is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions]
        (folder / "test_predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    draw_learning_curve(folder / "learning_curve.png", record)
    write_json(folder / "record.json", record)


def draw_learning_curve(path: Path, record: Mapping[str, Any]) -> None:
    """Training loss by step, and the validation metrics below it; what was run, and on what."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No learning curve: Matplotlib is not installed (pip install matplotlib).")
        return
    names = [name for name in record["validation"][0] if name not in ("step", "epoch")]
    figure = Figure(figsize=(6, 2.2 * (1 + len(names))), layout="constrained")
    axes = figure.subplots(1 + len(names), sharex=True, squeeze=False)[:, 0]
    axes[0].plot(range(1, len(record["losses"]) + 1), record["losses"], linewidth=1)
    axes[0].set_ylabel("training loss")
    at = [metrics["step"] for metrics in record["validation"]]
    for axis, name in zip(axes[1:], names, strict=True):
        axis.plot(at, [metrics[name] for metrics in record["validation"]], marker="o")
        axis.axvline(record["best_step"], color="black", linestyle="dotted")
        axis.set_ylabel(f"validation {name.replace('_', ' ')}")
    axes[-1].set_xlabel("step (dotted: the best checkpoint)")
    settings = record["settings"]
    title = f"{settings['model']}, {settings['attn']}, up to {settings['max_length']} tokens"
    figure.suptitle(f"{title}\n{origin(record)}", fontsize=8)
    figure.savefig(path, dpi=120)


def peak_memory_mib() -> float:
    """Most memory this process has held: on the GPU if there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def _digest_of_weights(model: PreTrainedModel) -> str:
    """Of those that the checkpoint has."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.rpartition(".")[0] not in model.new_modules:
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(rows: Mapping[str, Dataset]) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        for row in rows.get(part, ()):
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()
