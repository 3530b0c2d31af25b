"""Conversions that ready a pretrained encoder for documents longer than it was trained on."""

from hf_skein.convert.checkpoint import Conversion, convert_checkpoint
from hf_skein.convert.positions import extend_positions


__all__ = ["Conversion", "convert_checkpoint", "extend_positions"]
