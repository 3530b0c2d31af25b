"""`python -m hf_skein.env`: what runs here and why, to paste into a report of a problem."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .attention import why_no_kernels
from .config import SkeinConfig


_PACKAGES = ("hf-skein", "torch", "transformers", "triton", "kernels", "peft", "accelerate")


def report() -> str:
    """Versions, and for every device the backend that `backend="auto"` takes, with the reason."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} is not installed")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return "\n".join([*lines, *map(_device, devices)])


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        name = f"cpu, {torch.get_num_threads()} threads"
    else:
        properties = torch.cuda.get_device_properties(device)
        platform_name = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        name = f"{device}, {properties.name} ({platform_name}, {properties.total_memory / 2**30:.0f} GiB)"
    probe = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    reason = why_no_kernels(SkeinConfig(), probe, probe)
    if device.type == "cpu" and reason is None:
        reason = "on a CPU they run in Triton's interpreter, which is for tests"
    chosen = "the Triton kernels" if reason is None else f"the PyTorch path; not the Triton kernels: {reason}"
    return f'{name}: backend="auto" takes {chosen}'


if __name__ == "__main__":
    print(report())
