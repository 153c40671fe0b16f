"""Where the Triton kernels run in these tests: on the GPU, or in Triton's interpreter (`make test` sets that up).

TRITON_INTERPRET=1 PYTHONPATH=.venv/interpreter .venv/bin/python -m pytest tests/triton
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    """ "cuda" where there is a GPU, else "cpu" with the kernels interpreted, which takes small shapes only."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    return "cpu"
