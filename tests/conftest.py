import os
import random


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


if not torch.cuda.is_available():  # then Triton's interpreter runs the kernels; nothing has imported triton yet
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fresh buffers hold NaN, so an element that nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def text(tmp_path):
    """A file of 700 random words, each of them one token of BERT's."""
    words = ["river", "bridge", "spring", "old", "high", "the", "was", "closed", "letter", "of", "north", "and"]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=700)))
    return path
