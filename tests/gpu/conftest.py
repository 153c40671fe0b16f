"""Shared by the tests that need a GPU."""

import pytest

from peft_mamba import kernels


@pytest.fixture(params=["torch", "mamba_ssm"])
def path(request, monkeypatch):
    """With mamba-ssm's kernels where they are installed, and as if they were not."""
    if problem := kernels.available("cuda")[request.param]:
        pytest.skip(problem)
    monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, request.param)
    return request.param
