"""Scores of tokens under a frozen head against the definition in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mamba.kernels import head

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def scores_in_float64(logits, targets, temperature, gradient=None):
    """log p(target), the entropy, whether target is the first of the highest; and a score's gradient by the logits."""
    z = logits.detach().double().requires_grad_()
    counts = targets != head.IGNORED
    log_p = (z / temperature).log_softmax(-1)
    log_probs = log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0] * counts
    entropy = -(log_p.exp() * log_p).sum(-1) * counts
    by_logits = None
    if gradient is not None:
        (by_logits,) = torch.autograd.grad({"log_probs": log_probs, "entropy": entropy}[gradient].sum(), z)
    return log_probs.detach(), entropy.detach(), (z.argmax(-1) == targets) & counts, by_logits


def drawn(tokens, vocabulary, width, dtype, ignored=0.3):
    hidden = torch.randn(tokens, width).to(dtype)
    weight = (torch.randn(vocabulary, width) / width**0.5 * 2).to(dtype)
    targets = torch.randint(vocabulary, (tokens,))
    targets[torch.rand(tokens) < ignored] = head.IGNORED
    return hidden, weight, targets


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(deadline=None)
@given(
    tokens=st.integers(0, 300),
    vocabulary=st.integers(2, 40),
    width=st.integers(1, 9),
    temperature=st.floats(0.3, 3),
    ignored=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    known=st.booleans(),
    chunk=st.sampled_from([1, 2**12, 2**28]),
    seed=st.integers(0, 2**32),
)
def test_scores_and_gradients(dtype, tokens, vocabulary, width, temperature, ignored, known, chunk, seed):
    torch.manual_seed(seed)
    hidden, weight, targets = drawn(tokens, vocabulary, width, dtype, ignored)
    hidden.requires_grad_()
    count = int((targets != head.IGNORED).sum()) if known else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CPU_CHUNK_BYTES", chunk)
        scores = head.token_scores(hidden, weight, targets, temperature=temperature, outputs=head.OUTPUTS, count=count)
        by = torch.randn(2, tokens).to(scores.log_probs)
        (got,) = torch.autograd.grad(scores.log_probs @ by[0] + scores.entropy @ by[1], hidden)
    exact = hidden.detach().double().requires_grad_()
    # What the head makes of it, in its dtype: from there on all is exact.
    logits = (hidden.detach() @ weight.t()).double()
    through = exact @ weight.double().t()
    log_probs, entropy, is_top1, _ = scores_in_float64(logits, targets, temperature)
    assert scores.log_probs.dtype == scores.entropy.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(scores.log_probs.double(), log_probs, atol=1e-4)
    assert torch.allclose(scores.entropy.double(), entropy, atol=1e-4)
    assert torch.equal(scores.is_top1, is_top1)
    assert got.dtype == dtype
    counts = (targets != head.IGNORED).double()
    log_p = (through / temperature).log_softmax(-1)
    total = (log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0] * counts) @ by[0].double()
    total = total - ((log_p.exp() * log_p).sum(-1) * counts) @ by[1].double()
    (expected,) = torch.autograd.grad(total, exact)
    # Of a few numbers the gradient may be a small difference of large ones.
    size = (by.double().norm(dim=0) * counts).norm() * weight.double().norm(dim=1).max() / temperature
    assert (got.double() - expected).norm() <= TOLERANCE[dtype] * size
    assert not got[targets == head.IGNORED].any()


def test_gradcheck():
    hidden, weight, targets = drawn(7, 5, 3, torch.float64)
    scores = lambda hidden: head.token_scores(hidden, weight, targets, outputs=("entropy",))[:2]  # noqa: E731
    torch.autograd.gradcheck(scores, (hidden.requires_grad_(),))


def test_logits_are_made_once_and_only_a_chunk_is_held(monkeypatch):
    """Two products by the weight for a loss and its gradient, and none for rows that are ignored."""
    rows = []
    mm = torch.mm

    def counted(a, b, *args, **kwargs):
        rows.append(a.shape[0])
        return mm(a, b, *args, **kwargs)

    hidden, weight, targets = drawn(1000, 64, 8, torch.float32, 0.0)
    targets[300:] = head.IGNORED
    monkeypatch.setattr(head, "CPU_CHUNK_BYTES", 128 * 64 * 4)
    monkeypatch.setattr(torch, "mm", counted)
    scores = head.token_scores(hidden.requires_grad_(), weight, targets, count=300)
    assert rows == [128, 128, 44]
    scores.log_probs.sum().backward()
    assert rows == [128, 128, 44]


def test_small_probabilities_in_float16():
    """Of a large vocabulary each is below float16's normal range: their sum is what the gradient is made of."""
    hidden, targets = torch.zeros(4, 2).half().requires_grad_(), torch.arange(4)
    weight = torch.tensor([1.0, -0.5]).half().expand(50000, 2).contiguous()
    head.token_scores(hidden, weight, targets).log_probs.sum().backward()
    assert hidden.grad.abs().max() < 2e-3  # w[target] - mean(w) is 0


def test_autocast_and_no_gradient():
    hidden, weight, targets = drawn(20, 12, 6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head.token_scores(hidden.requires_grad_(), weight, targets)
    assert scores.log_probs.dtype == torch.float32 and scores.entropy is None and scores.is_top1 is None
    expected, *_ = scores_in_float64((hidden.bfloat16() @ weight.bfloat16().t()), targets, 1.0)
    assert torch.allclose(scores.log_probs.double(), expected, atol=1e-5)
    scores.log_probs.sum().backward()
    assert hidden.grad.dtype == torch.float32
    with torch.no_grad():
        assert not head.token_scores(hidden, weight.requires_grad_(), targets).log_probs.requires_grad
    with pytest.raises(ValueError, match="add_fused_lm_head"):
        head.token_scores(hidden, weight, targets)
