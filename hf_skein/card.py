"""Model cards: what a model with skein attention is, how to load it, what was measured, and its limits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from huggingface_hub.utils.sha import sha_fileobj

from .config import SkeinConfig, with_window


CONVERSION_RECORD = "skein_conversion.json"
VERIFICATION_RECORD, VERIFICATION_PLOT = "skein_verify.json", "skein_verify.png"
TRAINING_RECORD = "record.json"  # what the fine-tuning scripts write
RECORDS = (CONVERSION_RECORD, VERIFICATION_RECORD, VERIFICATION_PLOT, TRAINING_RECORD)

# Heads of Transformers' classes and the Hub's name of their task.
_TASKS = {
    "": "feature-extraction",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MultipleChoice": "multiple-choice",
}
_METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "exact_match": "exact_match", "f1": "f1"}
_CARRIED_OVER = ("license", "license_name", "license_link", "language")
_ALWAYS_SHOWN = ("method", "num_columns", "num_strata", "block_size", "max_blocks", "min_length")
_MARK = re.compile(r"\n<!-- Made by hf-skein\. Delete this line if you edit the card\. ([0-9a-f]{64}) -->\n*\Z")


class HubError(RuntimeError):
    """A card cannot be made or a push failed; the message says why, what is on the Hub now, and what to do."""


@dataclass(frozen=True)
class Table:
    """A section of a card: a heading, a paragraph and a table."""

    title: str
    text: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Args:
        repo_id: Full name of the repository on the Hub.
        architecture: Transformers' class, e.g. `BertForMaskedLM`.
        settings: Skein's.
        base_model: Its name on the Hub.
        origin: How the model was made from it: a sentence.
        carried_over: License and language of the base model, as the metadata of a card has them.
        max_length: Tokens of the longest document.
        limits: Sentences.
        tables: What was measured.
        results: Metrics of the trained model.
        is_trained: Whether the model was trained with skein attention.
        library: The Hub's name of the library that loads it.
        task: The Hub's name of the task, if it does not follow from the class.
    """

    repo_id: str
    architecture: str
    settings: SkeinConfig
    base_model: str | None = None
    origin: str | None = None
    carried_over: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    limits: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    results: list[EvalResult] = field(default_factory=list)
    is_trained: bool = False
    library: str = "transformers"
    task: str | None = None


def render(facts: Facts) -> ModelCard:
    """The card that states the facts, with a mark by which `is_untouched` knows it."""
    _, _, head = facts.architecture.partition("For")
    task = facts.task or _TASKS.get(head)
    name = facts.repo_id.rpartition("/")[2]
    data = ModelCardData(
        base_model=facts.base_model,
        library_name=facts.library,
        pipeline_tag=task,
        tags=["skein", "long-context"],
        eval_results=facts.results or None,
        model_name=name if facts.results else None,
        **facts.carried_over,
    )
    card = ModelCard.from_template(
        data,
        template_str=files("hf_skein.model_cards").joinpath("template.md.jinja").read_text(encoding="utf-8"),
        name=name,
        repo_id=facts.repo_id,
        base_model=facts.base_model,
        origin=facts.origin,
        architecture=facts.architecture,
        auto_class=f"AutoModelFor{head}" if head in _TASKS and head else facts.architecture if head else "AutoModel",
        max_length=facts.max_length,
        settings=_shown_settings(facts.settings),
        exact_length=facts.settings.exact_length,
        num_columns=facts.settings.num_columns,
        method=facts.settings.method,
        has_layers=bool(facts.settings.layers),
        is_trained=facts.is_trained,
        limits=facts.limits,
        tables=facts.tables,
    )
    text = f"{card}\n"
    mark = f"\n<!-- Made by hf-skein. Delete this line if you edit the card. {_digest(text)} -->\n"
    return ModelCard(text + mark)


def is_untouched(text: str) -> bool:
    """Whether a card was written by `render` and nobody has edited it since."""
    text = text.replace("\r\n", "\n")
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


def _shown_settings(settings: SkeinConfig) -> dict[str, Any]:
    """The main fields, and those that are not at their default."""
    default = SkeinConfig()
    names = [f.name for f in dataclasses.fields(SkeinConfig)]
    shown = [n for n in names if n in _ALWAYS_SHOWN or getattr(settings, n) != getattr(default, n)]
    return {name: json.dumps(settings.to_dict()[name]) for name in shown}


# --- from a folder ---


def make_card(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    token: str | bool | None = None,
) -> ModelCard:
    """The card of a model with skein attention, from the files of its folder.

    Read are `config.json`, `tokenizer_config.json` and, where they are there, what `hf-skein convert`,
    `hf-skein verify` and the fine-tuning scripts wrote. License and language are carried over from the base model's
    card on the Hub, which is not asked if `license` is given.

    Args:
        folder: What `save_pretrained` wrote.
        repo_id: Full name of the repository on the Hub, `owner/name`.
        base_model: Its name on the Hub; default: what the conversion or the training recorded.
        license: As the Hub spells it, e.g. `apache-2.0`.
        token: For a base model that is private.

    Raises:
        HubError: The folder has no `config.json` of a model with skein attention, or a file cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder)
    conversion = _read_record(folder / CONVERSION_RECORD, "source", "commit", "positions", "notes", "versions")
    settings = SkeinConfig.from_dict(with_window(config["skein"], config.get("attention_window")))
    verification = _read_record(
        folder / VERIFICATION_RECORD, "checks", "rows", "skein", "weights", "text", "versions", "hardware"
    )
    if verification:
        _check_verified(folder, verification, settings)
    training = _read_record(folder / TRAINING_RECORD, "settings", "versions", "hardware")
    task, library = _TASKS.get(config["architectures"][0].partition("For")[2]), "transformers"
    if (folder / "modules.json").exists():
        task, library = "sentence-similarity", "sentence-transformers"
    base_model = base_model or _converted_from(conversion) or _trained_from(training)
    facts = Facts(
        repo_id=repo_id,
        architecture=config["architectures"][0],
        settings=settings,
        base_model=base_model,
        origin=_origin(conversion),
        carried_over={"license": license} if license else _carried_over(base_model, token),
        max_length=_max_length(folder),
        limits=conversion.get("notes", []),
        tables=[*_verification_tables(verification, folder), *_training_tables(training)],
        results=_training_results(training, task),
        is_trained=training.get("settings", {}).get("attn") == "skein",
        library=library,
        task=task,
    )
    return render(facts)


def _check_verified(folder: Path, verification: dict[str, Any], settings: SkeinConfig) -> None:
    """Whether what was verified is what is there."""
    other = None
    if SkeinConfig.from_dict(verification["skein"]) != settings:
        other = "settings than config.skein has"
    elif verification["weights"] != digests_of_weights(folder):
        other = "weights than the folder has"
    if other:
        raise HubError(
            f"{folder / VERIFICATION_RECORD} was made with other {other} now. Run `hf-skein verify` again, or delete "
            "it."
        )


def digests_of_weights(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of weights in a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = sha_fileobj(file).hex()
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model with skein attention.

    Raises:
        HubError: There is none, or it is another model's.
    """
    config = read_json(folder / "config.json")
    if not config:
        raise HubError(
            f"{folder} has no config.json: it is not the folder of a model. Give what `hf-skein convert` made."
        )
    if not isinstance(config.get("skein"), dict) or not config.get("architectures"):
        missing = "skein" if config.get("architectures") else "architectures"
        raise HubError(
            f"{folder / 'config.json'} has no `{missing}`: the model was not saved with skein's settings. Convert it "
            "with `hf-skein convert`, or call hf_skein.configure(model) before model.save_pretrained(folder)."
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is not there."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HubError(f"{path} cannot be read as JSON ({error}). Mend or delete it.") from error
    if not isinstance(value, dict):
        raise HubError(f"{path} holds a {type(value).__name__}; expected is a JSON object. Mend or delete it.")
    return value


def _max_length(folder: Path) -> int | None:
    length = read_json(folder / "tokenizer_config.json").get("model_max_length")
    return length if isinstance(length, int) and length < 10**9 else None  # beyond: Transformers' word for "not set"


def _carried_over(base_model: str | None, token: str | bool | None) -> dict[str, Any]:
    """What the base model's card on the Hub says of license and language."""
    if base_model is None:
        return {}
    try:
        text = read_remote(base_model, "README.md", token=token)
    except (EntryNotFoundError, RepositoryNotFoundError):  # a model without a card, or one that is not on the Hub
        return {}
    data = ModelCard(text, ignore_metadata_errors=True).data
    return {name: data.get(name) for name in _CARRIED_OVER if data.get(name) is not None}


def read_remote(repo_id: str, path: str, *, revision: str = "main", token: str | bool | None = None) -> str:
    """The text of a file on the Hub, past the cache."""
    response = get_session().get(hf_hub_url(repo_id, path, revision=revision), headers=build_hf_headers(token=token))
    hf_raise_for_status(response)
    return response.content.decode("utf-8")


def _read_record(path: Path, *needed: str) -> dict[str, Any]:
    """A record that hf-skein wrote, empty if there is none."""
    record = read_json(path)
    missing = [name for name in needed if record and name not in record]
    if missing:
        raise HubError(f"{path} is no record of hf-skein: it lacks {', '.join(missing)}. Rename or delete it.")
    return record


# A record reduces a path to its last part, so a name with an owner is the Hub's.


def _converted_from(conversion: dict[str, Any]) -> str | None:
    if not conversion or conversion["source"] == conversion["commit"]:  # a folder of the cache, given as such
        return None
    is_on_hub = "/" in conversion["source"] or conversion["commit"] is not None
    return conversion["source"] if is_on_hub else None


def _trained_from(training: dict[str, Any]) -> str | None:
    name = training.get("settings", {}).get("model", "")
    return name if "/" in name else None


def _origin(conversion: dict[str, Any]) -> str | None:
    if not conversion:
        return None
    commit = f" at commit {conversion['commit'][:12]}" if conversion["commit"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in conversion["versions"].items())
    return (
        f"Made by `hf-skein convert` from a `{conversion['source_class']}` for {conversion['old_length']} "
        f"tokens{commit}; positions: `{conversion['positions']}` ({versions})."
    )


def _verification_tables(record: dict[str, Any], folder: Path) -> list[Table]:
    if not record:
        return []
    text = (
        f"By `hf-skein verify`, against exact attention ([{VERIFICATION_RECORD}]({VERIFICATION_RECORD})): hidden "
        f"states after the last layer, means over {record['documents']} documents of each length, "
        f"median times of {record['repeats']} forward passes, text: {record['text']['name']}. {_circumstances(record)}"
    )
    if (folder / VERIFICATION_PLOT).exists():
        text += f"\n\n![Error, time and memory over the length]({VERIFICATION_PLOT})"
    measures = ("relative_error", "token_cosine", "document_cosine")
    costs = ("exact_seconds", "skein_seconds", "exact_mib", "skein_mib")
    columns = ["tokens", "relative error", "cosine of tokens", "of documents"]
    columns += ["exact, s", "skein, s", "exact, MiB", "skein, MiB"]
    rows = [
        [str(row["length"]), *(_cell(row[name][-1]) for name in measures), *(_cell(row[name]) for name in costs)]
        for row in record["rows"]
    ]
    checks = [[check["name"], "yes" if check["passed"] else "**no**", check["found"]] for check in record["checks"]]
    outcome = "All of these hold" if all(c["passed"] for c in record["checks"]) else "**Not all of these hold**"
    return [
        Table("Skein against exact attention", text, columns, rows),
        Table("Checks", f"{outcome}.", ["check", "holds", "found"], [[_cell(x) for x in row] for row in checks]),
    ]


def _training_tables(record: dict[str, Any]) -> list[Table]:
    if not record:
        return []
    settings = record["settings"]
    shown = ("dataset", "attn", "max_length", "epochs", "batch_size", "learning_rate", "seed", "mixed_precision")
    rows = [[name.replace("_", " "), _cell(settings[name])] for name in shown if settings.get(name) is not None]
    for part, lengths in record.get("lengths", {}).items():
        value = f"{lengths['documents']} documents"
        if "mean" in lengths:  # of a stream it is not known
            value += f", {_cell(lengths['mean'])} tokens on average"
        rows.append([f"{part} data", f"{value}, {lengths['truncated']} truncated"])
    rows += [[f"test {name.replace('_', ' ')}", _cell(value)] for name, value in record.get("test", {}).items()]
    text = (
        f"Recorded by the script that trained it; the whole record is [{TRAINING_RECORD}]({TRAINING_RECORD}). "
        f"{_circumstances(record)}"
    )
    return [Table("Training", text, ["", ""], rows)]


def _training_results(record: dict[str, Any], task: str | None) -> list[EvalResult]:
    dataset = record.get("settings", {}).get("dataset")
    if dataset is None or task is None:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type=_METRICS[name],
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in record.get("test", {}).items()
        if name in _METRICS
    ]


def _circumstances(record: dict[str, Any]) -> str:
    versions, hardware = record["versions"], record["hardware"]
    place = hardware.get("gpu") or hardware.get("cpu") or f"{hardware['device']}, {hardware['threads']} threads"
    return f"On {place}, with torch {versions['torch']} and transformers {versions['transformers']}."


def _cell(value: Any) -> str:
    text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
