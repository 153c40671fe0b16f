"""Mamba-2's scan over sequences of which several go on from one state: together in a chunk, each as if alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_mamba.kernels import reference
from peft_mamba.kernels.host import ON_HOST, OnHost

from ..peft_mamba.tiny import relative_rms
from .cases import poisoned
from .test_pool import inputs_for

CHUNK = 16
SHAPE = (2, 5, 9)


@pytest.fixture(autouse=True)
def small(device, monkeypatch):
    """On a CPU, chunks that are small in both precisions."""
    from peft_mamba.kernels.triton import ssd_plan

    monkeypatch.setattr(ssd_plan, "CHUNK_FLOAT32", CHUNK)
    monkeypatch.setattr(ssd_plan, "CHUNK", CHUNK if device == "cpu" else 64)


def known(inputs, index):
    return {ON_HOST: OnHost(inputs["cu_seqlens"].cpu().numpy(), None if index is None else np.array(index))}


def double(inputs):
    floats = (name for name, each in inputs.items() if torch.is_tensor(each) and each.is_floating_point())
    return inputs | {name: inputs[name].double() for name in floats}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("starts", ["pool", "own", "nothing"])
def test_each_is_as_if_alone(starts, dtype, device):
    from peft_mamba.kernels.triton import ssd

    lengths_ = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 33])

    @settings(max_examples=12, deadline=None)
    @given(sequences=st.lists(st.tuples(lengths_, st.integers(0, 2)), min_size=1, max_size=8))
    @example(sequences=[(3, 1), (5, 1), (8, 1), (1, 1), (4, 2), (4, 1), (33, 1), (2, 1)])
    @example(sequences=[(1, 0)] * 16)
    @example(sequences=[(17, 0), (0, 0), (4, 0), (0, 0), (4, 0), (16, 2), (16, 2)])
    def check(sequences):
        lengths, index = zip(*sequences, (5, 1), strict=True)
        inputs, shape = inputs_for("ssd", lengths, device, dtype)
        del inputs["return_final_state"]
        if starts == "pool":
            states = {"initial_state": torch.randn(3, *shape, device=device)}
            states["initial_index"] = torch.tensor(index, device=device)
        else:
            states = {"initial_state": torch.randn(len(lengths), *shape, device=device)} if starts == "own" else {}
        memo = known(inputs, index if starts == "pool" else None)
        with torch.no_grad(), poisoned():
            for _ in range(2):  # found out, and then known
                y, final = ssd.ssd(**inputs, **states, memo=memo)
                assert final is None
                expected, _ = reference.ssd(**double(inputs | states))
                assert relative_rms(y, expected) < (1e-5 if dtype == torch.float32 else 1e-2)

    check()


def test_a_chunk_holds_as_many_as_fit(device):
    """By the memory that is taken: of a chunk there are step sizes and three factors."""
    from peft_mamba.kernels.triton.ssd_families import Families

    def families(lengths, index, has_initial=True):
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        numbers = OnHost(bounds, None if index is None else np.array(index))
        where = None if index is None else torch.tensor(index, device=device)
        return Families.of(numbers, CHUNK, cu_seqlens, where, has_initial)

    found = families([4, 4, 4, 4, 4, 3, 20, 5], [1, 1, 1, 1, 1, 2, 2, 2])
    assert found.bounds.tolist() == [0, 16, 20, 23, 43, 48] and found.bounds.dtype == torch.int32
    assert found.source.tolist() == [1, 1, 2, 2, 2]
    assert (found.documents[0].diff() != 0).nonzero().flatten().tolist() == [3, 7, 11, 15, 19, 22, 42]
    assert not found.one_chunk
    assert families([4, 4, 4, 4], [1, 1, 1, 1]).one_chunk
    assert families([8, 8, 8], None, False).bounds.tolist() == [0, 16, 24]  # all from nothing
    apart = families([8, 8, 8], None)  # each from a state of its own
    assert apart.bounds.tolist() == [0, 8, 16, 24] and apart.documents is None and apart.one_chunk
    alone = families([16, 33, 16], [1, 1, 1])  # nothing fits together
    assert alone.documents is None and alone.source.tolist() == [1, 1, 1] and not alone.one_chunk
    assert families([60] * 30 + [2, 2], [0] * 32).documents is None  # one chunk of 122 is not worth it


def test_states_that_are_wanted_keep_sequences_apart(device):
    from peft_mamba.kernels.triton import ssd

    inputs, shape = inputs_for("ssd", [3, 4, 5], device)
    pool, index = torch.randn(2, *shape, device=device), torch.tensor([1, 1, 0], device=device)
    with torch.no_grad():
        expected = ssd.ssd(**inputs, initial_state=pool, initial_index=index)
        actual = ssd.ssd(**inputs, initial_state=pool, initial_index=index, memo=known(inputs, [1, 1, 0]))
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_a_gradient_needs_none_of_it(device):
    from peft_mamba.kernels.triton import ssd

    inputs, shape = inputs_for("ssd", [3, 4, 5], device)
    del inputs["return_final_state"]
    pool = torch.randn(2, *shape, device=device, requires_grad=True)
    index = torch.tensor([1, 1, 0], device=device)
    gradients = []
    for memo in (None, known(inputs, [1, 1, 0])):
        y, _ = ssd.ssd(**inputs, initial_state=pool, initial_index=index, memo=memo)
        gradients.append(torch.autograd.grad(y.square().sum(), pool)[0])
    assert torch.equal(*gradients)
