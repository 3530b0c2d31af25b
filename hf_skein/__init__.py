"""Skein attention: linear-cost sketched attention for pretrained Transformers encoders.

Importing the package registers `attn_implementation="skein"`. Torch and Transformers' modeling code are not loaded
before somebody needs them.
"""

import importlib
from typing import TYPE_CHECKING

from ._on_import import when_imported
from .config import SkeinConfig


if TYPE_CHECKING:
    from .attention import skein_attention
    from .baselines import register_baselines
    from .registration import configure

__version__ = "0.1.0"
__all__ = ["SkeinConfig", "configure", "register_baselines", "skein_attention"]


_HOMES = {"skein_attention": ".attention", "configure": ".registration", "register_baselines": ".baselines"}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    if name in ("convert", "hub"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


when_imported("transformers.modeling_utils", lambda: importlib.import_module(".registration", __name__))
