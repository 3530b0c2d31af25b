"""`SkeinConfig`: every knob of skein attention, documented once. It is stored as plain JSON in `config.skein`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


CONFIG_VERSION = 1

_CHOICES = {
    "method": ("adaptive", "skeinformer", "vmean", "exact"),
    "column_sampling": ("importance", "uniform"),
    "row_normalization": ("adaptive", "simple", "none"),
    "residual": (None, "second_order", "mean", "geometric"),
    "backend": ("auto", "torch", "triton", "reference"),
}
_MINIMUM = {
    "num_columns": 1,
    "block_size": 1,
    "max_blocks": 1,
    "num_strata": 1,
    "exact_rows": 0,
    "min_length": 0,
    "num_pilots": 1,
    "seed": 0,
}


@dataclass(frozen=True)
class SkeinConfig:
    """Settings of skein attention. A model gets them by `hf_skein.configure` or `config.skein = settings.to_dict()`.

    Args:
        method: `"adaptive"` (ours: routed blocks of queries, each with its own columns), `"skeinformer"` (Algorithm 1
            of the paper), `"vmean"` (every row is the mean of the values; a baseline) or `"exact"`.
        num_columns: Keys each query attends to exactly; the rest is summarised by the residual. A sequence of at most
            this many keys is computed exactly.
        block_size: Most queries that share their columns (`adaptive` only); the number of blocks is a power of two.
            Smaller is more accurate and slower.
        max_blocks: Most blocks per head (`adaptive` only), rounded down to a power of two; a sequence longer than
            `block_size` times that gets larger blocks, which keeps the cost linear.
        num_strata: Groups of similar keys (second-order residual only); in each, the keys that are not columns are
            summarised by their mean. More is more accurate and slower.
        num_pilots: Query rows that choose the columns. `None` is the method's own: `num_columns` random rows for
            `skeinformer`, 1 mean query per block for `adaptive` (more: means of sub-blocks).
        column_sampling: `"importance"` chooses columns by the pilots; `"uniform"` ignores them (an ablation of the
            paper).
        row_normalization: `"adaptive"` gives the columns not chosen the mass of the residual; `"simple"` normalises
            over the chosen ones alone; `"none"` divides by the true row sums, which costs n² time (both ablations).
        residual: How the columns not chosen are summarised under adaptive row normalisation: `"geometric"` (eq. 6 of
            the paper: geometric mean of the chosen), `"mean"` (geometric mean of those not chosen) or
            `"second_order"` (their means per stratum, and covariances within strata). `None` is the method's own:
            `geometric` for `skeinformer`, else `second_order`.
        pilot_reutilization: Overwrite the pilot rows with their exact result (`skeinformer` only).
        exact_rows: The first tokens (CLS) attend exactly and are columns of every block (`adaptive` only).
        min_length: A sequence of at most this many keys is computed exactly; below the default a sketch costs more time
            than it saves.
        seed: Key of the counter-based random numbers (`skeinformer` and uniform columns; `adaptive` draws none).
        strict: Raise where the sketch cannot represent what the model asks for, instead of running exact attention.
        backend: `"torch"` (chunked, linear memory), `"triton"` (kernels for CUDA and ROCm), `"reference"` (the
            formulas, slow, for checking) or `"auto"`: triton on CUDA and ROCm where the kernels can, else torch.
        layers: Per-layer overrides, e.g. `{0: {"method": "exact"}, 1: {"num_columns": 256}}`.

    Raises:
        ValueError: A field has a value that is not allowed; the message names it, what was given and what is allowed.
    """

    method: str = "adaptive"
    num_columns: int = 128
    block_size: int = 64
    max_blocks: int = 16
    num_strata: int = 64
    num_pilots: int | None = None
    column_sampling: str = "importance"
    row_normalization: str = "adaptive"
    residual: str | None = None
    pilot_reutilization: bool = True
    exact_rows: int = 1
    min_length: int = 1024
    seed: int = 0
    strict: bool = False
    backend: str = "auto"
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)) or value not in allowed:
                raise ValueError(f"SkeinConfig.{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if name == "num_pilots" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"SkeinConfig.{name} is {value!r}; allowed is an integer >= {minimum}.")
        if self.seed >= 2**32:
            raise ValueError(f"SkeinConfig.seed is {self.seed!r}; allowed is an integer from 0 to 2**32 - 1.")
        if self.exact_rows > self.num_columns:
            raise ValueError(
                f"SkeinConfig.exact_rows is {self.exact_rows}; allowed is at most num_columns ({self.num_columns}), "
                "because exact rows are also columns."
            )
        for name in ("strict", "pilot_reutilization"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"SkeinConfig.{name} is {getattr(self, name)!r}; allowed are True and False.")
        object.__setattr__(self, "layers", self._checked_layers())

    def _checked_layers(self) -> dict[int, dict[str, Any]]:
        """`layers` with integer keys; each override is validated by building the configuration it stands for."""
        if not isinstance(self.layers, Mapping):
            raise ValueError(
                f"SkeinConfig.layers is {self.layers!r}; allowed is a dict of layer index to a dict of fields."
            )
        layers: dict[int, dict[str, Any]] = {}
        for key, overrides in self.layers.items():
            index = int(key) if isinstance(key, str) and key.isdigit() else key
            if not isinstance(index, int) or isinstance(index, bool) or index < 0 or index in layers:
                raise ValueError(f"SkeinConfig.layers has the key {key!r}; allowed are distinct layer indices >= 0.")
            if not isinstance(overrides, Mapping):
                raise ValueError(f"SkeinConfig.layers[{key!r}] is {overrides!r}; allowed is a dict of fields.")
            unknown = sorted(set(overrides) - (_FIELD_NAMES - {"layers"}))
            if unknown:
                raise ValueError(
                    f"SkeinConfig.layers[{key!r}] has {', '.join(unknown)}; allowed are "
                    f"{', '.join(sorted(_FIELD_NAMES - {'layers'}))}."
                )
            try:
                dataclasses.replace(self, layers={}, **overrides)
            except ValueError as error:
                raise ValueError(f"In SkeinConfig.layers[{key!r}]: {error}") from None
            layers[index] = dict(overrides)
        return layers

    @property
    def exact_length(self) -> int:
        """Longest sequence, in keys, that is computed exactly."""
        return max(self.num_columns, self.min_length)

    @property
    def resolved_residual(self) -> str:
        """The residual in use; `None` resolved to the method's own."""
        if self.residual is not None:
            return self.residual
        return "geometric" if self.method == "skeinformer" else "second_order"

    @property
    def resolved_strata(self) -> int:
        """The number of strata in use: one where the residual knows none."""
        second_order = self.row_normalization == "adaptive" and self.resolved_residual == "second_order"
        return self.num_strata if second_order else 1

    def for_layer(self, layer: int | None) -> SkeinConfig:
        """The configuration of one layer, its overrides applied.

        Args:
            layer: Index of the layer, or `None` if the module does not know it.

        Raises:
            ValueError: There are per-layer overrides but the module does not know its index.
        """
        if not self.layers:
            return self
        if layer is None:
            raise ValueError(
                "config.skein has per-layer overrides (`layers`), but this model's attention modules carry no "
                "`layer_idx`, so they cannot be told apart. Remove `layers` with hf_skein.configure(model, layers={})."
            )
        return dataclasses.replace(self, layers={}, **self.layers.get(layer, {}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: every field, and the version of this format."""
        values = {name: getattr(self, name) for name in sorted(_FIELD_NAMES - {"layers"})}
        layers = {str(index): dict(overrides) for index, overrides in sorted(self.layers.items())}
        return {"version": CONFIG_VERSION, **values, "layers": layers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SkeinConfig:
        """The inverse of `to_dict`; fields that are left out have their default.

        Raises:
            ValueError: `values` is no dict, a value is not allowed, or the version is newer than this package knows.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"config.skein is {values!r}; allowed is a dict of SkeinConfig fields.")
        values = dict(values)
        version = values.pop("version", CONFIG_VERSION)
        if not isinstance(version, int) or version > CONFIG_VERSION:
            raise ValueError(
                f"config.skein has version {version!r}; this hf-skein reads up to {CONFIG_VERSION}. Upgrade hf-skein."
            )
        unknown = sorted(set(values) - _FIELD_NAMES)
        if unknown:
            warnings.warn(f"Ignoring unknown keys in config.skein: {', '.join(unknown)}.", UserWarning, stacklevel=2)
        return cls(**{name: value for name, value in values.items() if name in _FIELD_NAMES})


def with_window(values: Mapping[str, Any], window: int | Sequence[int] | None) -> dict[str, Any]:
    """Fields of `SkeinConfig`, and those that Longformer's `attention_window` adds where they give no `num_columns`.

    Every query gets as many columns as there are keys in the window, of all layers or of each.
    """
    if window is None or "num_columns" in values:
        return dict(values)
    sizes = [window] if isinstance(window, int) else list(window)
    if len(set(sizes)) == 1:
        return {"num_columns": sizes[0], **values}
    layers = {str(layer): {"num_columns": size} for layer, size in enumerate(sizes)}
    for layer, overrides in values.get("layers", {}).items():
        layers[str(layer)] = {**layers.get(str(layer), {}), **overrides}
    return {**values, "layers": layers}


_FIELD_NAMES = frozenset(f.name for f in dataclasses.fields(SkeinConfig))
