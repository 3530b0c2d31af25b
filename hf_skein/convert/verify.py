"""`verify`: is a converted model the one it was made from, and what does skein cost and save where it is longer?"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..card import digests_of_weights
from ..registration import NAME, _skein_config
from . import architecture
from .checkpoint import RECORD as CONVERSION
from .checkpoint import _find, _get_tokenizer, _load, _name
from .positions import position_limit


RECORD, PLOT = "skein_verify.json", "skein_verify.png"
TOLERANCE = 1e-5  # of results that are to be the same, relative to the largest of them


@dataclass(frozen=True)
class Check:
    """Something that must hold.

    Attributes:
        name: What.
        passed: Whether it does.
        found: What was seen.
    """

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Row:
    """Skein against exact attention at one length, means over the documents.

    Attributes:
        length: Tokens of a document.
        least_cosine: Of the documents, after the last layer.
        relative_error: Of the hidden states after each layer, `‖skein - exact‖ / ‖exact‖`.
        token_cosine: Mean cosine of a token's hidden state in both, after each layer.
        document_cosine: Cosine of the mean hidden state in both, after each layer.
        exact_seconds: Median time of a forward pass.
        skein_seconds: Likewise.
        exact_mib: Most memory in use during a forward pass, beyond what was before; None where it is not known.
        skein_mib: Likewise.
    """

    length: int
    least_cosine: float
    relative_error: list[float]
    token_cosine: list[float]
    document_cosine: list[float]
    exact_seconds: float
    skein_seconds: float
    exact_mib: float | None
    skein_mib: float | None


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        source: Name of the original.
        destination: Name of the converted model.
        model_class: Of the converted model.
        skein: Its settings.
        weights: The SHA-256 of each of its files of weights.
        checks: What must hold.
        rows: One per length.
        documents: Documents per length.
        repeats: Timed forward passes per length.
        text: Where the text came from, and its SHA-256.
        versions: Of the packages.
        hardware: What the times depend on.
    """

    source: str
    destination: str
    model_class: str
    skein: dict[str, Any]
    weights: dict[str, str]
    checks: list[Check]
    rows: list[Row]
    documents: int
    repeats: int
    text: dict[str, str]
    versions: dict[str, str]
    hardware: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        values = {**vars(self), "checks": [vars(c) for c in self.checks], "rows": [vars(r) for r in self.rows]}
        return {"passed": self.passed, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verification:
        """The inverse of `to_dict`; what else a record may hold is left out."""
        fields = {f.name: values[f.name] for f in dataclasses.fields(cls)}
        checks, rows = [Check(**c) for c in values["checks"]], [Row(**r) for r in values["rows"]]
        return cls(**{**fields, "checks": checks, "rows": rows})


@torch.no_grad()
def verify(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    text: str | os.PathLike | None = None,
    lengths: Sequence[int] | None = None,
    documents: int = 3,
    repeats: int = 3,
    min_cosine: float = 0.9,
    device: str = "cpu",
    allow_pickle: bool = False,
) -> Verification:
    """Compares a converted model with its original, and skein with exact attention, in float32.

    Up to the original length both must compute the same, by exact attention and by skein as far as it is exact. For a
    Longformer that length is what its window reaches, for positions that were interpolated it is nothing.

    Args:
        source: The original: name on the Hub, or a folder.
        destination: The folder that `convert_checkpoint` wrote, or its name on the Hub.
        text: A file to read instead of the built-in sample, the documentation that comes with Python.
        lengths: Tokens of the documents; default: 1024, 2048, 4096 and so on, up to the new length.
        documents: Documents per length, one after another of the text.
        repeats: Timed forward passes per length, exact and skein by turns.
        min_cosine: Least cosine that the mean hidden state of any document may have after the last layer, skein to
            exact.
        device: Where to run.
        allow_pickle: Read `pytorch_model.bin` of the original if need be.

    Returns:
        What was found; `passed` says whether all is well.

    Raises:
        ValueError: A model cannot be read, a length is not within the model's, or the text is too short.
        OSError: A file cannot be read.
    """
    source, destination = os.path.expanduser(source), os.path.expanduser(destination)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)  # whose memory is measured, and which is waited for
    folders = _find(source, None, allow_pickle), _find(destination, None, allow_pickle=False)
    model, _ = _load(folders[1], None, allow_pickle=False)
    sketched, _ = _load(folders[1], None, allow_pickle=False, attention=NAME)
    # If the conversion rounded the weights, the original is to be rounded likewise.
    original, _ = _load(folders[0], str(model.dtype).removeprefix("torch."), allow_pickle)
    original, model, sketched = (m.float().to(device) for m in (original, model, sketched))
    models = {"exact attention": model, "skein": sketched}
    if original.config.model_type == "big_bird":
        original.base_model.set_attention_type("original_full")
    tokenizer = _get_tokenizer(None, folders[1])
    limit = position_limit(model)
    if lengths is None:
        lengths = [*(length for length in (2**i for i in range(10, 31)) if length < limit), limit]
    if any(not 1 < length <= limit for length in lengths):
        raise ValueError(f"lengths must be from 2 to {limit}, what {type(model).__name__} takes; got {list(lengths)}.")
    content, text_source = _read_text(text)
    agreement = _agreement_length(original, folders[1])
    tokens = _tokens(tokenizer, content, max(*lengths, agreement or 0), documents)

    skein = _skein_config(model.config)
    checks = [
        _check_class(original, model),
        Check("config.skein is set", getattr(model.config, "skein", None) is not None, skein.method),
        Check(
            "the tokenizer's limit is the model's",
            tokenizer.model_max_length <= limit,
            f"{tokenizer.model_max_length} and {limit} tokens",
        ),
        *_check_agreement(original, models, tokens, agreement, skein.exact_length),
    ]
    del original
    rows = [_measure(model, sketched, tokens, length, repeats) for length in sorted(set(lengths))]
    finite = all(map(torch.isfinite, torch.tensor([row.relative_error[-1] for row in rows])))
    checks.append(Check("skein's hidden states are finite", finite, f"at {', '.join(str(row.length) for row in rows)}"))
    worst = min(row.least_cosine for row in rows)
    checks.append(
        Check(f"each document keeps a cosine of {min_cosine:g}", worst >= min_cosine, f"the least is {worst:.4f}")
    )
    return Verification(
        source=_name(source),
        destination=_name(destination),
        model_class=type(model).__name__,
        skein=skein.to_dict(),
        weights=digests_of_weights(folders[1]),
        checks=checks,
        rows=rows,
        documents=documents,
        repeats=repeats,
        text=text_source,
        versions={name: version(name) for name in ("hf-skein", "transformers", "torch")},
        hardware=_hardware(device),
    )


# --- text ---


def _read_text(path: str | os.PathLike | None) -> tuple[str, dict[str, str]]:
    if path is not None:
        try:
            content, name = Path(path).read_text(encoding="utf-8"), Path(path).name
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text: {error}.") from error
    else:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise ValueError("This Python comes without its documentation; give a text (--text).") from None
        content, name = "\n\n".join(topics.values()), f"documentation of Python {platform.python_version()}"
    return content, {"name": name, "sha256": hashlib.sha256(content.encode()).hexdigest()}


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, documents: int
) -> Callable[[int], list[Tensor]]:
    """A function from a length to documents `[1, length]` of so many tokens, special ones included."""
    words, short = (_ids(tokenizer, x, add_special_tokens=False) for x in (text, text[:100]))
    marked = _ids(tokenizer, text[:100])
    first = next(i for i in range(len(marked)) if marked[i : i + len(short)] == short)
    before, after = marked[:first], marked[first + len(short) :]
    if len(words) < length * documents:
        raise ValueError(
            f"{documents} documents of {length} tokens are asked for, and the text has {len(words)}. Give a longer "
            "text, fewer documents or lesser lengths."
        )

    def cut(n: int) -> list[Tensor]:
        inner = n - len(before) - len(after)
        pieces = [words[i * length : i * length + inner] for i in range(documents)]
        return [torch.tensor([[*before, *piece, *after]]) for piece in pieces]

    return cut


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    return tokenizer(text, verbose=False, **options)["input_ids"]


# --- the same as before ---


def _check_class(original: PreTrainedModel, model: PreTrainedModel) -> Check:
    name = "the class and the names of its weights are the original's"
    became = "and"
    if architecture.converts(original.config.model_type):
        name, became = "the class and the names of its weights are those that the original is converted to", "became"
        expected, _ = architecture.to_full_attention(original)
    else:
        expected = original
    same = type(expected) is type(model) and expected.state_dict().keys() == model.state_dict().keys()
    return Check(name, same, f"{type(original).__name__} {became} {type(model).__name__}")


def _agreement_length(original: PreTrainedModel, folder: Path) -> int | None:
    """Tokens up to which both must compute the same, or None if they need not."""
    record = folder / CONVERSION
    if record.exists() and json.loads(record.read_text(encoding="utf-8"))["positions"] == "interpolate":
        return None
    if original.config.model_type == "longformer":
        reach = min(original.config.attention_window) // 2 + 1
        return min(reach, original.config.max_position_embeddings - original.config.pad_token_id - 1)
    if original.config.model_type == "big_bird":
        return original.config.max_position_embeddings
    return position_limit(original)


def _check_agreement(
    original: PreTrainedModel,
    models: Mapping[str, PreTrainedModel],
    tokens: Callable[[int], list[Tensor]],
    length: int | None,
    exact_length: int,
) -> list[Check]:
    if length is None:
        return [Check("results are the original's", True, "not asked: interpolated positions change all of them")]
    checks = []
    for attention, model in models.items():
        longest = min(length, exact_length) if attention == "skein" else length
        name = f"up to {longest} tokens, {attention} computes what the original does"
        if longest < 8:
            checks.append(Check(name, True, "not asked: so few tokens show nothing"))
            continue
        difference = 0.0
        for n in sorted({8, longest // 2, longest} - set(range(8))):
            for ids in tokens(n)[:2]:
                expected, found = _results(original, ids), _results(model, ids)
                difference = max(difference, *(_difference(x, y) for x, y in zip(found, expected, strict=True)))
        checks.append(Check(name, difference <= TOLERANCE, f"largest difference {difference:.1e} of {TOLERANCE:g}"))
    return checks


def _results(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What the head gives, and the hidden states before it."""
    output = _forward(model, ids, output_hidden_states=True)
    named = [output.get(name) for name in ("last_hidden_state", "logits", "start_logits", "end_logits")]
    return [x for x in (*named, _hidden_states(output)[-1]) if x is not None]


def _difference(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    difference = ((x - y).abs().max() / y.abs().max()).item()
    return difference if difference == difference else float("inf")


# --- skein and exact attention ---


def _forward(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    ids = ids.to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "longformer":
        inputs["global_attention_mask"] = torch.zeros_like(ids)
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: x[:, None] for name, x in inputs.items()}
    return model(**inputs, **options)


def _hidden_states(output: Any) -> tuple[Tensor, ...]:
    """Of the encoder, after each layer."""
    states = output.get("encoder_hidden_states")
    return (output.hidden_states if states is None else states)[1:]


def _measure(
    exact: PreTrainedModel, skein: PreTrainedModel, tokens: Callable[[int], list[Tensor]], length: int, repeats: int
) -> Row:
    documents = tokens(length)
    errors = [_compare(exact, skein, ids) for ids in documents]
    relative, token, document = torch.tensor(errors).mean(0).tolist()  # [documents, 3, layers]
    mib = [_cost(model, documents[0], measure_memory=True)[1] for model in (exact, skein)]
    seconds = [[_cost(model, documents[0])[0] for model in (exact, skein)] for _ in range(repeats)]  # by turns
    medians = map(statistics.median, zip(*seconds, strict=True))
    least = min(cosine[-1] for _, _, cosine in errors)
    return Row(length, least, relative, token, document, *medians, *mib)


def _compare(
    exact: PreTrainedModel, skein: PreTrainedModel, ids: Tensor
) -> tuple[list[float], list[float], list[float]]:
    """Relative error, cosine of tokens and of the document, after each layer."""
    states = (_hidden_states(_forward(model, ids, output_hidden_states=True)) for model in (exact, skein))
    pairs = [(x[0].double(), y[0].double()) for x, y in zip(*states, strict=True)]
    return (
        [((y - x).norm() / x.norm()).item() for x, y in pairs],
        [F.cosine_similarity(x, y, dim=-1).mean().item() for x, y in pairs],
        [F.cosine_similarity(x.mean(0), y.mean(0), dim=-1).item() for x, y in pairs],
    )


def _cost(model: PreTrainedModel, ids: Tensor, measure_memory: bool = False) -> tuple[float, float | None]:
    """Seconds of a forward pass, and MiB at its peak beyond those before."""
    before = _start_of_peak(model.device) if measure_memory else None
    start = time.perf_counter()
    _forward(model, ids)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, None if before is None else (_peak(model.device) - before) / 2**20


def _start_of_peak(device: torch.device) -> float | None:
    """Bytes in use now, from where the peak is counted; None where nothing tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # memory that is freed but kept would be used again without being noticed
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
    except OSError:
        return None
    return _peak(device)


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def _hardware(device: str) -> dict[str, Any]:
    is_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else device,
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


# --- what to look at ---


def table(found: Verification) -> str:
    """The checks and the measurements as text."""
    lines = [f"{'ok' if check.passed else 'OFF':4} {check.name} ({check.found})" for check in found.checks]
    head = ["tokens", "error, last layer", "layers", "token cosine", "document cosine", "exact s", "skein s", "faster"]
    head += ["exact MiB", "skein MiB"]
    rows = [head]
    for row in found.rows:
        error = row.relative_error
        rows.append([f"{row.length}", f"{error[-1]:.4f}", f"{min(error):.4f}-{max(error):.4f}"])
        rows[-1] += [f"{row.token_cosine[-1]:.4f}", f"{row.document_cosine[-1]:.4f}"]
        rows[-1] += [f"{row.exact_seconds:.3f}", f"{row.skein_seconds:.3f}"]
        rows[-1] += [f"{row.exact_seconds / row.skein_seconds:.1f}x"]
        rows[-1] += ["-" if mib is None else f"{mib:.0f}" for mib in (row.exact_mib, row.skein_mib)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["", *("  ".join(map(str.rjust, row, widths)) for row in rows)]
    return "\n".join(lines)


def load(folder: str | os.PathLike) -> Verification:
    """What `save` wrote."""
    values = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    return Verification.from_dict(values)


def save(found: Verification, folder: str | os.PathLike) -> list[Path]:
    """Writes `skein_verify.json` and, if Matplotlib is installed, `skein_verify.png`; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    written = [partial.replace(folder / RECORD)]
    try:
        import matplotlib
    except ModuleNotFoundError:
        return written
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row in found.rows:
        left.plot(range(1, len(row.relative_error) + 1), row.relative_error, marker="o", label=f"{row.length} tokens")
    left.set(xlabel="layer", ylabel="relative error of hidden states", ylim=(0, None))
    left.set_title("Skein against exact attention")
    left.legend()
    lengths = [row.length for row in found.rows]
    for name in ("exact", "skein"):
        right.plot(lengths, [getattr(row, f"{name}_seconds") for row in found.rows], marker="o", label=name)
    right.set(xlabel="tokens", ylabel="seconds", xscale="log", yscale="log")
    right.set_xticks(lengths, map(str, lengths))
    right.set_xticks([], minor=True)
    right.set_title(f"Forward pass on {found.hardware['device']}, threads: {found.hardware['threads']}")
    right.legend()
    figure.suptitle(f"{found.source} to {found.destination}")
    figure.savefig(folder / PLOT, dpi=120)
    pyplot.close(figure)
    return [*written, folder / PLOT]
