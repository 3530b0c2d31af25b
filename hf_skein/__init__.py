"""Skein attention: linear-cost sketched attention for pretrained Transformers encoders."""

from .attention import skein_attention
from .config import SkeinConfig


__all__ = ["SkeinConfig", "skein_attention"]
