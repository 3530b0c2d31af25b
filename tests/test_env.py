import os
import subprocess
import sys
from importlib.metadata import version

import torch

from hf_skein import attention, env


def test_report_says_what_is_used_and_why():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hf_skein.env"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"hf-skein {version('hf-skein')}\n" in text and f"torch {version('torch')}\n" in text
    cpu = next(line for line in text.splitlines() if line.startswith("cpu"))
    assert "takes the PyTorch path" in cpu and "it needs a CUDA or ROCm device" in cpu
    assert text.count('backend="auto"') == 1 + torch.cuda.device_count()


def test_report_without_triton_and_in_its_interpreter(monkeypatch):
    if not torch.cuda.is_available():
        assert "interpreter, which is for tests" in env.report()
    monkeypatch.setattr(attention, "_HAS_TRITON", False)
    assert "takes the PyTorch path; not the Triton kernels: triton is not installed" in env.report()
