"""The kernel of the output head against PyTorch in float64, and against PyTorch in its own dtype."""

from __future__ import annotations

import pytest
import torch

from peft_mamba.kernels import head

from ..peft_mamba.test_head import scores_in_float64
from ..peft_mamba.tiny import relative_rms

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """The kernel, and blocks smaller than a vocabulary."""
    kernels = pytest.importorskip("peft_mamba.kernels.head_triton")
    monkeypatch.setattr(kernels, "TILE", {"ROWS": 2, "COLUMNS": 32, "num_warps": 1})
    monkeypatch.setattr(head.fused, "for_tensor", lambda name, x: kernels)
    return kernels


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gradient", ["log_probs", "entropy", None])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(9, 200), (6, 64), (7, 63), (1, 1)])
def test_scores_of_a_chunk(device, kernel, tokens, vocabulary, gradient, dtype):
    wide = torch.full((tokens, vocabulary + 5), float("nan"), dtype=dtype, device=device)
    logits = wide[:, :vocabulary].copy_(torch.randn(tokens, vocabulary, device=device) * 3)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    targets[::4] = head.IGNORED
    # Of equal ones the first is the mode, which no GPU promises.
    logits[1:3] = 0.5
    targets[1:2], targets[2:3] = vocabulary - 1, 0
    given = logits.cpu(), targets.cpu()
    expected = [None if x is None else x.to(device) for x in scores_in_float64(*given, 0.7, gradient)]
    out = [torch.full((tokens,), 7.0, device=device) for _ in range(2)]
    is_top1 = torch.zeros(tokens, dtype=torch.bool, device=device)
    kernel.score(logits, targets, 1 / 0.7, 2.0, (*out, is_top1), gradient)
    assert torch.allclose(out[0].double(), expected[0], atol=1e-4) and torch.allclose(
        out[1].double(), expected[1], atol=1e-4
    )
    assert torch.equal(is_top1, expected[2])
    assert wide[:, vocabulary:].isnan().all()
    if gradient is not None and vocabulary > 1:
        assert relative_rms(logits.double() / 2, expected[3]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_as_in_pytorch(device, monkeypatch, dtype):
    """All of it: chunks, gathered rows, both gradients."""
    for name in ("CHUNK_BYTES", "CPU_CHUNK_BYTES"):
        monkeypatch.setattr(head, name, 128 * 96 * dtype.itemsize)
    weight = (torch.randn(90, 24, device=device) / 2).to(dtype)
    targets = torch.randint(90, (300,), device=device)
    targets[40:200] = head.IGNORED
    made = {}
    for which in ("kernel", "pytorch"):
        torch.manual_seed(0)
        hidden = torch.randn(300, 24, device=device).to(dtype).requires_grad_()
        if which == "pytorch":
            monkeypatch.setattr(head.fused, "for_tensor", lambda name, x: None)
        scores = head.token_scores(hidden, weight, targets, outputs=head.OUTPUTS, count=140)
        weights = torch.randn(2, 300, device=device)
        (scores.log_probs @ weights[0] + scores.entropy @ weights[1]).backward()
        made[which] = scores, hidden.grad
    (ours, d_ours), (theirs, d_theirs) = made.values()
    assert torch.allclose(ours.log_probs, theirs.log_probs, atol=1e-4)
    assert torch.allclose(ours.entropy, theirs.entropy, atol=1e-4)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert relative_rms(d_ours.double(), d_theirs.double()) < TOLERANCE[dtype]
    assert not d_ours[40:200].any()
