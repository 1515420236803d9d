"""One thread per test process: two threads collapse when anything else runs on a small machine.

Without a GPU Triton's kernels run in its interpreter, and that is decided when they are defined: before any import.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def ours_tokenizer():
    """A vocabulary as trained here, with markers that are single tokens."""
    from scripted import ours_vocabulary

    return ours_vocabulary()


@pytest.fixture(scope="session")
def released_like():
    """One like the released, where `<think>` is several tokens."""
    from scripted import released_vocabulary

    return released_vocabulary()
