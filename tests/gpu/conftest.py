"""Shared by the tests that need a GPU."""

import pytest

from peft_mamba import kernels


@pytest.fixture(params=["torch", "triton", "mamba_ssm"])
def path(request, monkeypatch):
    """With each set of kernels that a GPU may run, as far as they are installed."""
    if problem := kernels.available("cuda")[request.param]:
        pytest.skip(problem)
    monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, request.param)
    return request.param
