"""Triton kernels of hf-skein, installed as `hf_skein.kernels`.

The package imports torch and triton only, so that it can also be published on its own.
"""

from .ops import skein_attention, why_not


__all__ = ["skein_attention", "why_not"]
