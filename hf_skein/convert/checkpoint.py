"""`convert_checkpoint`: a pretrained encoder, from wherever it is, to a folder that reads long documents with skein."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ..registration import NAME, configure
from . import architecture
from .positions import extend_positions, extend_rotary, is_rotary, position_limit


RECORD = "skein_conversion.json"
POSITIONS = ("tile", "interpolate", "keep")
DTYPES = ("float32", "float16", "bfloat16")
FAMILIES = {
    "a position table": (
        "bert",
        "bert-generation",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "camembert",
        "distilbert",
        "electra",
        "albert",
        "ernie",
        "mobilebert",
        "data2vec-text",
        "esm",
        "roc_bert",
        "xmod",
        "bart",
        "mbart",
    ),
    "rotary positions": ("modernbert", "eurobert", "nomic_bert", "gte", "jina_embeddings_v3"),
    "a sparse pattern, which becomes full attention": ("longformer", "big_bird"),
}

# What a model is made of; nothing else is downloaded.
_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors", "[0-9]_*/*"]
_PICKLE = "pytorch_model*.bin"


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; `skein_conversion.json` in the destination holds the same.

    Attributes:
        source: Name on the Hub, or of the folder or the class.
        commit: Commit of a source on the Hub.
        source_class: Class of the source.
        model_class: Class of the result: the same, unless the source was a Longformer or a BigBird.
        positions: `"tile"`, `"interpolate"`, `"keep"`, or `"rotary"` where the angles go on as they are.
        old_length: Tokens that the source takes.
        max_length: Tokens that the result takes.
        skein: Settings, as in `config.skein`.
        notes: What the user should know, one sentence or two each.
        versions: Of the packages that made it.
    """

    source: str
    commit: str | None
    source_class: str
    model_class: str
    positions: str
    old_length: int
    max_length: int
    skein: dict[str, Any]
    notes: list[str]
    versions: dict[str, str]


def convert_checkpoint(
    source: str | os.PathLike | PreTrainedModel,
    destination: str | os.PathLike,
    max_length: int | None = None,
    *,
    positions: str | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | Literal[False] | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Writes an encoder that reads long documents to a folder, with its tokenizer and skein's settings.

    The class, its head and the keys of its `state_dict` stay (a Longformer becomes a RoBERTa, a BigBird a BERT). The
    result is made in a hidden folder beside the destination, loaded once to see that it is whole, and then moved there.

    Args:
        source: Name on the Hub, a folder, or a loaded model, which is left as it is.
        destination: Folder to write.
        max_length: Tokens of the longest document, special tokens included; default: what the source takes.
        positions: `"tile"` copies the position table end to end, `"interpolate"` stretches it (or squeezes the angles
            of a rotary model), `"keep"` leaves the length as it is. Default: `"tile"` for a table; the angles of a
            rotary model go on as they are.
        settings: Fields of `SkeinConfig`; those left out have what the source says, or their default.
        tokenizer: The tokenizer, its name on the Hub or its folder; `False` for none. Default: the source's.
        dtype: `"float32"`, `"float16"` or `"bfloat16"` to write; default: as in the source.
        revision: Branch, tag or commit of a source on the Hub.
        allow_pickle: Read `pytorch_model.bin` where there are no safetensors.
        overwrite: Replace the destination, at the end, if it is the folder of a model.

    Returns:
        What was done.

    Raises:
        ValueError: An argument, or the source, is not as above; the message says what is, and what to do.
        OSError: Something cannot be read or written. After any error the destination is as it was.
    """
    if isinstance(source, str | os.PathLike):
        source = os.path.expanduser(source)
    _check_arguments(max_length, positions, dtype, revision, source)
    destination = Path(destination).expanduser().resolve()
    _check_destination(destination, overwrite)
    folder = None
    if not isinstance(source, PreTrainedModel):
        folder = _find(source, revision, allow_pickle)
        _check_not_source(destination, folder)
    model, notes = _load(folder, dtype, allow_pickle) if folder is not None else _copy(source, dtype)
    tokenizer = _get_tokenizer(tokenizer, folder)
    source_class = type(model).__name__
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer knows {len(tokenizer)} tokens, {source_class} only {model.config.vocab_size}: they do not "
            "belong together. Give the right one with tokenizer=... (--tokenizer)."
        )

    if architecture.converts(model.config.model_type):
        model, more = architecture.to_full_attention(model)
        notes += more
    old_length = position_limit(model)
    positions, more = _set_length(model, tokenizer, max_length, positions)
    notes += more
    skein = configure(model, **(settings or {}))
    conversion = Conversion(
        source=_name(source),
        commit=_commit(folder),
        source_class=source_class,
        model_class=type(model).__name__,
        positions=positions,
        old_length=old_length,
        max_length=max_length or old_length,
        skein=skein.to_dict(),
        notes=notes,
        versions={name: version(name) for name in ("hf-skein", "transformers", "torch")},
    )
    with _made_whole(destination, overwrite) as partial:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if folder is not None:
            _copy_sentence_transformers(folder, partial, max_length)
        record = json.dumps(dataclasses.asdict(conversion), indent=2)
        (partial / RECORD).write_text(record + "\n", encoding="utf-8")
        _check_written(model, partial)
    return conversion


# --- arguments ---


def _check_arguments(
    max_length: object, positions: str | None, dtype: str | None, revision: str | None, source: object
) -> None:
    if max_length is not None and (not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1):
        raise ValueError(f"max_length must be a number of tokens, an int >= 1, got {max_length!r}.")
    if positions not in (None, *POSITIONS):
        raise ValueError(f"positions must be one of {', '.join(map(repr, POSITIONS))}, got {positions!r}.")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}.")
    if not isinstance(source, str | os.PathLike | PreTrainedModel):
        raise ValueError(
            f"source must be a name on the Hub, a folder or a model of Transformers, got {type(source).__name__}. "
            "Merge adapters first (model.merge_and_unload())."
        )
    if revision is not None and (isinstance(source, PreTrainedModel) or Path(source).is_dir()):
        raise ValueError(f"revision={revision!r} is for a source on the Hub; got {_name(source)!r}, which is not.")


def _check_destination(destination: Path, overwrite: bool) -> None:
    if not destination.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{destination} exists. Give another destination, or overwrite=True (--overwrite).")
    if not destination.is_dir() or (any(destination.iterdir()) and not (destination / "config.json").is_file()):
        raise FileExistsError(f"{destination} is not the folder of a model and will not be overwritten.")


def _check_not_source(destination: Path, folder: Path) -> None:
    if destination in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"The source lies in the destination, {destination}. Give another destination.")


def _name(source: str | os.PathLike | PreTrainedModel) -> str:
    """A name without the folders of this machine."""
    if isinstance(source, PreTrainedModel):
        source = source.name_or_path or type(source).__name__
    return Path(source).resolve().name if Path(source).exists() or Path(source).is_absolute() else str(source)


def _commit(folder: Path | None) -> str | None:
    """The commit of a snapshot that came from the Hub."""
    if folder is None or folder.parent.name != "snapshots":
        return None
    return folder.name


# --- reading ---


def _find(source: str | os.PathLike, revision: str | None, allow_pickle: bool) -> Path:
    """The folder of a source, downloaded if need be."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(source)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name} is not a folder. Give the folder of a model, or its name on the Hub.")
    try:
        files = [*_FILES, _PICKLE] if allow_pickle else _FILES
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision}"
        raise OSError(
            f"{name} is no folder here, and cannot be had from the Hub{at}: {error} Check the name and the network; "
            "for a private or gated model, `hf auth login`."
        ) from error


def _check_family(config: PretrainedConfig) -> None:
    if config.model_type not in [name for names in FAMILIES.values() for name in names]:
        known = "; ".join(f"with {what}: {', '.join(names)}" for what, names in FAMILIES.items())
        raise ValueError(f"Encoders of type {config.model_type!r} cannot be converted. Known are, {known}.")
    if getattr(config, "is_decoder", False):
        raise ValueError("config.is_decoder is True: a decoder's attention is causal, and skein does not sketch that.")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The weights are quantized. Convert the checkpoint that was quantized, then quantize the result."
        )


def _load(
    folder: Path, dtype: str | None, allow_pickle: bool, attention: str | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """The model of a folder, and notes."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # it may be absent, no JSON, of no known type, or of wrong values
        raise ValueError(f"The configuration in {folder} cannot be read: {error}") from error
    _check_family(config)
    model_class = _model_class(config)
    has_safetensors = any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json"))
    if not has_safetensors and not allow_pickle:
        found = ", ".join(sorted(file.name for file in folder.glob(_PICKLE))) or "no safetensors"
        raise ValueError(
            f"{folder} has no weights in the safetensors format (found: {found}). A pickled checkpoint "
            "(pytorch_model.bin) is only read if you ask for it: allow_pickle=True (--allow-pickle)."
        )

    def load(**options: Any) -> tuple[PreTrainedModel, dict]:
        try:
            return model_class.from_pretrained(
                folder,
                dtype=dtype or "auto",
                use_safetensors=has_safetensors,
                attn_implementation=attention,
                output_loading_info=True,
                **options,
            )
        except (SafetensorError, UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as error:
            raise ValueError(
                f"The weights in {folder} cannot be read as a {model_class.__name__}: {error} If a file is damaged or "
                "truncated, download it again."
            ) from error

    model, info = load()
    notes = []
    missing = sorted(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing) and model.base_model is model:
        model, info = load(add_pooling_layer=False)
        missing = sorted(info["missing_keys"])
        notes.append("The checkpoint has no pooler, and neither has the result; from_pretrained makes a random one.")
    if missing:
        raise ValueError(
            f"{folder} lacks weights of {model_class.__name__}, which would be random: {_few(missing)}. Is "
            "config.architectures right?"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        notes.append(f"{model_class.__name__} has no place for, and left out: {_few(unexpected)}.")
    _check_weights(model)
    return model.eval(), notes


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that the checkpoint was saved from; the bare encoder if it does not say."""
    names = config.architectures or [MODEL_MAPPING[type(config)].__name__]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise ValueError(
            f"config.architectures is {names}, and Transformers {transformers.__version__} has no such class."
        )
    return model_class


def _copy(model: PreTrainedModel, dtype: str | None) -> tuple[PreTrainedModel, list[str]]:
    _check_family(model.config)
    _check_weights(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model has adapters. Merge them first (merge_and_unload() of the PEFT model).")
    model = copy.deepcopy(model)
    return model if dtype is None else model.to(getattr(torch, dtype)), []


def _check_weights(model: PreTrainedModel) -> None:
    if model.device.type == "meta":
        raise ValueError(f"{type(model).__name__} is on the meta device and has no weights. Load them first.")
    allowed = (torch.float64, *(getattr(torch, name) for name in DTYPES))
    wrong = sorted({str(p.dtype) for p in model.parameters() if p.dtype not in allowed})
    if wrong:
        raise ValueError(
            f"{type(model).__name__} has weights of {', '.join(wrong)}; expected is one of {', '.join(DTYPES)}. Give "
            "dtype=... (--dtype) to read them so."
        )


def _get_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | bool | None, folder: Path | None
) -> PreTrainedTokenizerBase | None:
    if tokenizer is False:
        return None
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return copy.deepcopy(tokenizer)
    if isinstance(tokenizer, str | os.PathLike):
        folder = _find(tokenizer, None, allow_pickle=False)
    elif tokenizer is not None:
        raise ValueError(f"tokenizer must be a tokenizer, a name, a folder or False, got {type(tokenizer).__name__}.")
    if folder is None:
        raise ValueError("With a loaded model give its tokenizer: tokenizer=..., or False for none.")
    hint = "Give one with tokenizer=... (--tokenizer), or go without: tokenizer=False (--no-tokenizer)."
    try:
        found = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever its files may do
        raise ValueError(f"The tokenizer in {folder} cannot be read: {error} {hint}") from error
    # Without its files, Transformers makes one that knows its special tokens only.
    files = {"tokenizer.json", *found.vocab_files_names.values()}
    if not any((folder / file).exists() for file in files):
        raise ValueError(f"{folder} has no tokenizer: there is none of {', '.join(sorted(files))}. {hint}")
    return found


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- length ---


def _set_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None, positions: str | None
) -> tuple[str, list[str]]:
    """Extends the positions; returns what was done to them, and notes."""
    old_length = position_limit(model)
    if positions == "keep" and max_length not in (None, old_length):
        raise ValueError(
            f'positions="keep" leaves the length at {old_length} tokens; got max_length={max_length}. Leave max_length '
            'out, or extend with "tile" or "interpolate".'
        )
    if max_length is None:
        if tokenizer is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, old_length)
        return "keep", []
    if is_rotary(model):
        if positions == "tile":
            raise ValueError(
                f"{type(model).__name__} has rotary positions and no table to tile. Leave `positions` out to let the "
                'angles go on as they are, or give "interpolate".'
            )
        extend_rotary(model, tokenizer, max_length, positions == "interpolate")
    else:
        extend_positions(model, tokenizer, max_length, "interpolate" if positions == "interpolate" else "tile")
    if max_length == old_length:
        return "keep", []
    if positions == "interpolate":
        return positions, [
            f"Positions were interpolated from {old_length} to {max_length} tokens: all of them moved, so the model "
            "needs training before it computes again what it did."
        ]
    if is_rotary(model):
        return "rotary", [
            f"Rotary positions have no table: the limit is {max_length} tokens now, and nothing changes up to "
            f"{old_length}. Beyond, the model meets angles that it was not trained on: look at hf-skein verify, train."
        ]
    return "tile", [
        f"The position table was tiled from {old_length} to {max_length} tokens: tokens {old_length} apart share a "
        "position until the model is trained further."
    ]


# --- writing ---


@contextmanager
def _made_whole(destination: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `destination` that takes its place at the end, or is removed."""
    partial = destination.with_name(f".{destination.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if destination.exists() and not overwrite:
            raise FileExistsError("it appeared in the meantime.")
        if destination.exists():
            old = partial.with_suffix(".old")
            destination.rename(old)
            try:
                partial.rename(destination)
            except BaseException:
                old.rename(destination)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(destination)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{destination} could not be written and is as it was: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_written(model: PreTrainedModel, folder: Path) -> None:
    """Load what was written, with skein, and compare."""
    expected = model.state_dict()
    bare = model.base_model is model and getattr(model, "pooler", True) is None
    options = {"add_pooling_layer": False} if bare else {}
    written, info = type(model).from_pretrained(
        folder, attn_implementation=NAME, dtype="auto", output_loading_info=True, **options
    )
    found = written.state_dict()
    wrong = [key for key in expected.keys() | found.keys() if not _same(expected.get(key), found.get(key))]
    if wrong or any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise OSError(f"what was read back differs in {_few(sorted(wrong)) or info}")


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first.cpu(), second.cpu())


def _copy_sentence_transformers(folder: Path, target: Path, max_length: int | None) -> None:
    """What sentence-transformers keeps beside a model: pooling and its like, and a length, changed if one is given."""
    if not (folder / "modules.json").exists():
        return
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    for path in (module["path"] for module in modules):
        if re.fullmatch(r"\d+_\w+", path) and (folder / path).is_dir():  # one without settings may have no folder
            shutil.copytree(folder / path, target / path)
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, target / name)
    limits = target / "sentence_bert_config.json"
    if max_length is not None and limits.exists():
        values = json.loads(limits.read_text(encoding="utf-8"))
        limits.write_text(json.dumps({**values, "max_seq_length": max_length}, indent=2) + "\n", encoding="utf-8")
