"""Triton kernels of hf-skein, installed as `hf_skein.kernels`.

The package imports torch and triton only, so that it can also be published on its own. It holds no kernel yet:
`backend="auto"` runs the PyTorch path on every device.
"""
