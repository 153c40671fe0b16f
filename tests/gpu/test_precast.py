"""Frozen weights held in half precision on a GPU: the same bits in less memory, within CUDA graphs and without.

python -m pytest tests/gpu/test_precast.py
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from peft_mamba import precast_frozen_weights, use_cuda_graphs
from peft_mamba.kernels import ENVIRONMENT_VARIABLE
from peft_mamba.mixers import LEVELS, graphs, recompute
from peft_mamba.precast import precastable

from ..peft_mamba.test_precast import assert_same_bits
from ..peft_mamba.test_recompute import trained
from ..peft_mamba.tiny import PRECISIONS, tokens
from .test_graphs import STEPS, assert_same, batch, losses

FAMILIES = ("mamba", "mamba2")
WIDE = {"mamba": {"hidden_size": 128}, "mamba2": {"hidden_size": 128, "num_heads": 16}}


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """Our kernels: their results are always the same."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")


@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_the_same_bits(family, precision, level, graphed, monkeypatch):
    replayed = []
    forward = graphs._StackGraph.forward
    monkeypatch.setattr(graphs._StackGraph, "forward", lambda self, step: replayed.append(self) or forward(self, step))
    model = trained(family, "all", **WIDE[family]).cuda()
    recompute(model, level)
    other = copy.deepcopy(model)
    if graphed:
        use_cuda_graphs(model), use_cuda_graphs(other)
    batches = [batch(seed) for seed in range(STEPS)]
    dtype = PRECISIONS[precision]
    with precast_frozen_weights(model, precision):
        assert_same_bits(losses(model, batches, dtype), losses(other, batches, dtype))
    assert len(replayed) == (2 * (STEPS - graphs.TIMES_IN_A_ROW + 1) if graphed else 0)
    for mine, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.device == expected.device and torch.equal(mine, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_of_weights_that_are_gone_is_not_replayed(family):
    model = trained(family, "all", **WIDE[family]).cuda()
    other = copy.deepcopy(model)
    use_cuda_graphs(model)
    batches = [batch(seed) for seed in range(3 * STEPS)]
    expected = losses(other, batches)
    with precast_frozen_weights(model, "bf16"):
        mine = losses(model, batches[:STEPS])
    # In the memory where they were, if torch has not given it back: numbers that would show.
    rubbish = [torch.full_like(each, float("nan"), dtype=torch.bfloat16) for each in precastable(model)]
    mine += losses(model, batches[STEPS : 2 * STEPS])
    del rubbish
    with precast_frozen_weights(model, "bf16"):
        mine += losses(model, batches[2 * STEPS :])
    assert_same(mine, expected, 2e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_take_half_the_memory(family, precision):
    model = trained(family, "all", **WIDE[family]).cuda()
    weights = precastable(model)
    saved = 2 * sum(each.numel() for each in weights)
    rounding = 512 * len(weights)

    def step():
        """Bytes at the peak, and between steps."""
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", PRECISIONS[precision]):
            loss = model(tokens().cuda(), labels=tokens().cuda(), use_cache=False).loss
        loss.backward()
        peak = torch.cuda.max_memory_allocated()
        del loss
        model.zero_grad(set_to_none=True)
        return peak, torch.cuda.memory_allocated()

    gc.collect()  # what earlier tests have left
    step()  # workspaces of cuBLAS
    peak, idle = step()
    with precast_frozen_weights(model, precision):
        assert not any(each.is_cuda for each in model.state_dict().values() if each.numel() == weights[0].numel())
        smaller_peak, smaller_idle = step()
        assert abs(idle - smaller_idle - saved) <= rounding
        assert peak - smaller_peak >= saved - rounding
    assert abs(step()[1] - idle) <= rounding


@pytest.mark.parametrize(("start", "end"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_the_originals_come_to_where_the_model_is_then(start, end):
    model = trained("mamba", "all").to(start)
    expected = [each.detach().cpu().clone() for each in model.parameters()]
    objects = list(model.parameters())
    with precast_frozen_weights(model, "bf16"):
        model.to(end)
    for parameter, before, value in zip(model.parameters(), objects, expected, strict=True):
        assert parameter is before and parameter.device.type == end and torch.equal(parameter.cpu(), value)
