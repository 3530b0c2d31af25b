"""Options of the fine-tuning scripts: model, skein attention, LoRA, training and output; what contradicts itself."""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from _data import InputError, fraction, non_negative_float, positive_float, positive_int, random_seed
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import hf_skein


def skein_help() -> dict[str, str]:
    """What the documentation of `SkeinConfig` says about each field."""
    text = hf_skein.SkeinConfig.__doc__.split("Args:\n")[1].split("\n\n")[0]
    found = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w|\Z)", text, re.M | re.S)
    return {name: re.sub(r"\s+", " ", about).replace("`", "").strip() for name, about in found}


def json_object(text: str) -> dict[str, Any]:
    """An argument that is a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


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
    group.add_argument("--max-length", type=positive_int, metavar="N", help="tokens (default: what the model takes)")
    group.add_argument(
        "--too-long",
        default="truncate",
        choices=("truncate", "error"),
        help="what to do about a document of more than --max-length tokens (default %(default)s)",
    )
    group.add_argument(
        "--positions",
        default="tile",
        choices=("tile", "interpolate"),
        help="how to extend a learned position table that is shorter than --max-length (default %(default)s)",
    )
    group = parser.add_argument_group("skein attention", "Each field of SkeinConfig.")
    hints, about = get_type_hints(hf_skein.SkeinConfig), skein_help()
    for field in dataclasses.fields(hf_skein.SkeinConfig):
        option = f"--skein-{field.name.replace('_', '-')}"
        text = about[field.name].replace("%", "%%")
        if hints[field.name] is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        elif field.name == "layers":
            group.add_argument(option, type=json_object, metavar="JSON", help=text)
        else:
            kind = int if hints[field.name] in (int, int | None) else str
            group.add_argument(option, type=kind, metavar="N" if kind is int else "NAME", help=text)
    group = parser.add_argument_group(
        "LoRA", "Low-rank adapters in place of all weights, but for a head of labels and what --model lacks."
    )
    group.add_argument("--lora", action="store_true", help="train adapters; they are saved in the folder `adapter`")
    group.add_argument(
        "--lora-merge", action="store_true", help="save the model with its adapters merged, not the base beside them"
    )
    group.add_argument("--lora-rank", type=positive_int, metavar="N", help="default 8")
    group.add_argument("--lora-alpha", type=positive_int, metavar="N", help="default twice the rank")
    group.add_argument("--lora-dropout", type=fraction, metavar="X", help="default 0")
    group.add_argument(
        "--lora-target-modules",
        nargs="+",
        metavar="NAME",
        help="names of linear layers, or all-linear (default: what peft knows of the architecture)",
    )


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the training loop and of its output."""
    group = parser.add_argument_group("training")

    def number(name: str, kind: Callable, default: float, text: str) -> None:
        group.add_argument(name, type=kind, default=default, metavar="X", help=f"{text} (default %(default)s)")

    number("--epochs", positive_int, 3, "passes over the training documents")
    group.add_argument("--max-steps", type=positive_int, metavar="X", help="steps, in place of --epochs")
    number("--batch-size", positive_int, 8, "documents per process and forward pass")
    number("--gradient-accumulation-steps", positive_int, 1, "batches per optimizer step")
    number("--learning-rate", positive_float, 5e-5, "peak: after linear warmup, before linear decay")
    number("--warmup-fraction", fraction, 0.1, "warmup as a share of all steps")
    number("--weight-decay", non_negative_float, 0.01, "of AdamW, for matrices; biases and norms have none")
    number("--max-gradient-norm", positive_float, 1.0, "clip gradients to this norm")
    number("--seed", random_seed, 0, "of new weights, dropout, splits and the order of documents")
    group.add_argument(
        "--evaluate-every", type=positive_int, metavar="STEPS", help="default: every epoch; with a stream, at the end"
    )
    group.add_argument(
        "--patience", type=positive_int, metavar="N", help="stop after N evaluations that are no better than the best"
    )
    group.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: Accelerate's configuration")
    group.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations to save memory")

    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", type=Path, required=True, help="gets the model, the tokenizer and record.json")
    group.add_argument("--save-every", type=positive_int, metavar="STEPS", help="checkpoint between evaluations, too")
    group.add_argument("--tracker", choices=sorted(map(str, LOGGER_TYPE_TO_CLASS)), help="log there as well")
    group.add_argument("--push-to-hub", metavar="REPO", help="upload the result, as `hf-skein push` does")
    group.add_argument("--private", action="store_true", help="with --push-to-hub: create the repository as private")
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="start anew in a folder that is not empty")


def skein_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SkeinConfig` that were given."""
    given = {f.name: getattr(args, f"skein_{f.name}") for f in dataclasses.fields(hf_skein.SkeinConfig)}
    return {name: value for name, value in given.items() if value is not None}


def check_options(args: argparse.Namespace) -> None:
    """What can be known before anything is read.

    Raises:
        InputError: Options contradict each other, the output folder holds something and neither --resume nor
            --overwrite was given, a tracker is not installed, or nothing could be pushed in the end.
    """
    folder = args.output_dir
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output-dir {folder} is a file; name a folder.")
    if folder.exists() and any(folder.iterdir()) and not (args.resume or args.overwrite):
        raise InputError(f"--output-dir {folder} is not empty: add --resume or --overwrite, or name another.")
    for option in ("model", "dataset", "validation_file", "test_file"):
        path = Path(getattr(args, option) or "")
        if getattr(args, option) and path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--{option.replace('_', '-')} {path} lies in --output-dir {folder}; name another folder.")
    if args.streaming and args.max_steps is None:
        raise InputError("--streaming needs --max-steps: the length of a stream is not known.")
    for option in ("merge", "rank", "alpha", "dropout", "target_modules"):
        if getattr(args, f"lora_{option}") not in (None, False) and not args.lora:
            raise InputError(f"--lora-{option.replace('_', '-')} needs --lora.")
    if args.private and not args.push_to_hub:
        raise InputError("--private needs --push-to-hub.")
    settings = skein_settings(args)
    if settings and args.attn != "skein":
        raise InputError(f"--attn {args.attn} has no setting {', '.join(settings)}; that needs --attn skein.")
    available = sorted(map(str, get_available_trackers()))
    if args.tracker and args.tracker not in available:
        raise InputError(f"--tracker {args.tracker} is not installed; installed are {', '.join(available) or 'none'}.")
    if args.push_to_hub:
        _check_push(args)


def _check_push(args: argparse.Namespace) -> None:
    try:
        validate_repo_id(args.push_to_hub)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {args.push_to_hub} is no owner/name: {error}") from error
    if args.attn != "skein":
        raise InputError(f"--push-to-hub is for models with skein attention, not for --attn {args.attn}.")
    if args.lora and not args.lora_merge:
        raise InputError("--push-to-hub needs a whole model: add --lora-merge.")
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push-to-hub: the offline mode is on. Unset HF_HUB_OFFLINE.")
    if get_token() is None:
        raise InputError("--push-to-hub: there is no token. Log in with `hf auth login`, or set HF_TOKEN.")
