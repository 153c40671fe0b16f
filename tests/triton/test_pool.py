"""Scans that start from states in a pool, and what they share: as from copies of these states, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_mamba import kernels
from peft_mamba.kernels import reference

from ..peft_mamba.tiny import relative_rms
from .cases import poisoned, ssd_case
from .scan_cases import Case, draw

OPERATIONS = ["selective_scan", "ssd"]


def inputs_for(operation, lengths, device, dtype=torch.float32):
    """Inputs of a packed row without a state, and the shape of a state."""
    torch.manual_seed(sum(lengths))
    if operation == "ssd":
        inputs, _ = ssd_case("whole", 1, sum(lengths), 2, 1, 5, 9, initial=False)
        given = {name: tensor.to(device, torch.float32) for name, tensor in inputs.items()}
        shape: tuple[int, ...] = (2, 5, 9)
    else:
        given, _ = draw(Case(batch=1, length=sum(lengths), channels=35, states=4), device)
        given.pop("initial_state")
        shape = (35, 4)
    given |= {name: given[name].to(dtype) for name in ("x", "u", "B", "C") if name in given}
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    return given | {"cu_seqlens": bounds, "return_final_state": True}, shape


@pytest.fixture(autouse=True)
def small(device, monkeypatch):
    """Several chunks, and segments of a long sequence, for small inputs too."""
    from peft_mamba.kernels.triton import selective_scan, ssd_plan

    monkeypatch.setattr(selective_scan, "SHORTEST_SEGMENT", 32)
    if device == "cpu":
        monkeypatch.setattr(ssd_plan, "CHUNK_FLOAT32", 16)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_states_are_read_where_they_lie(operation, device):
    from peft_mamba.kernels.triton import common

    @settings(max_examples=5, deadline=None)
    @given(sequences=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), min_size=1, max_size=5))
    @example(sequences=[(66, 1)])  # in segments
    def check(sequences):
        lengths, index = zip(*sequences, (1, 2), strict=True)
        inputs, shape = inputs_for(operation, lengths, device)
        pool = torch.randn(4, *shape, device=device)
        pool[[row for row in range(4) if row not in index]] = torch.nan  # belongs to none of them
        where = torch.tensor(index, device=device)
        scan = getattr(kernels.select(device, "triton"), operation)
        with torch.no_grad(), poisoned(), pytest.MonkeyPatch.context() as patch:
            expected = scan(**inputs, initial_state=pool[where])
            patch.setattr(common, "gathered", None)
            out = torch.empty_like(expected[0])
            actual = scan(**inputs, initial_state=pool, initial_index=where, out=out)
        assert actual[0] is out
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))

    check()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_pool_gets_the_gradients_of_all_that_start_from_it(operation, device):
    inputs, shape = inputs_for(operation, [3, 0, 9, 5], device)
    pool = torch.randn(3, *shape, device=device, requires_grad=True)
    where = torch.tensor([2, 0, 2, 0], device=device)
    scan = getattr(kernels.select(device, "triton"), operation)
    gradients = []
    for states in ({"initial_state": pool[where]}, {"initial_state": pool, "initial_index": where}):
        y, final = scan(**inputs, **states)
        gradients.append(torch.autograd.grad(y.sum() + final.square().sum(), pool)[0])
    assert torch.equal(*gradients) and gradients[0][0].any() and not gradients[0][1].any()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_of_a_batch_and_single_tokens_too(operation, device):
    where = torch.tensor([1, 1, 0], device=device)
    scan = getattr(kernels.select(device, "triton"), operation)
    for length in (1, 6):
        inputs, shape = inputs_for(operation, [3 * length], device)
        del inputs["cu_seqlens"]
        inputs |= {
            name: tensor.unflatten(1, (3, length))[0]
            for name, tensor in inputs.items()
            if torch.is_tensor(tensor) and tensor.shape[:2] == (1, 3 * length)
        }
        pool = torch.randn(2, *shape, device=device)
        with torch.no_grad():
            expected = scan(**inputs, initial_state=pool[where])
            out = torch.full_like(expected[0], torch.nan)
            actual = scan(**inputs, initial_state=pool, initial_index=where, out=out)
        assert actual[0] is out
        assert actual[0].shape[:2] == (3, length)
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_of_states_in_another_dtype_or_order_only_the_needed_are_copied(operation, device, monkeypatch):
    from peft_mamba.kernels.triton import common

    copied: list[torch.Tensor] = []
    gathered = common.gathered
    monkeypatch.setattr(common, "gathered", lambda *given: (copied.append(given[1]), gathered(*given))[1])
    inputs, shape = inputs_for(operation, [3, 4], device)
    where = torch.tensor([1, 1], device=device)
    scan = getattr(kernels.select(device, "triton"), operation)
    for pool in (torch.randn(2, *shape).bfloat16(), torch.randn(*shape, 2).movedim(-1, 0)):
        pool = pool.to(device)
        with torch.no_grad():
            expected = scan(**inputs, initial_state=pool[where])
            actual = scan(**inputs, initial_state=pool, initial_index=where)
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True)) and copied.pop() is where


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_index_is_checked(operation, device):
    inputs, shape = inputs_for(operation, [3, 4], device)
    scan = getattr(kernels.select(device, "triton"), operation)
    with torch.no_grad(), pytest.raises(ValueError, match="3 entries for the 2 sequences"):
        scan(**inputs, initial_state=torch.zeros(2, *shape, device=device), initial_index=torch.zeros(3).long())
    with pytest.raises(ValueError, match="no initial_state"):
        scan(**inputs, initial_index=torch.zeros(2).long())


def test_chunks_are_numbered_once_a_batch_and_precision(device, monkeypatch):
    from peft_mamba.kernels.triton import ssd

    made: list[torch.dtype] = []
    empty = torch.empty
    memo: dict = {}
    for turn in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            inputs, _ = inputs_for("ssd", [3, 0, 30, 70], device, dtype)
            with torch.no_grad(), monkeypatch.context() as patch:
                alone = ssd.ssd(**inputs)
                patch.setattr(torch, "empty", lambda *s, **given: (made.append(given["dtype"]), empty(*s, **given))[1])
                shared = ssd.ssd(**inputs, memo=memo)
            assert all(torch.equal(*pair) for pair in zip(alone, shared, strict=True))
            assert made.count(torch.int32) == (turn == 0)
            made.clear()


def test_states_between_chunks_are_those_of_their_own_sequence(device):
    """A first chunk has no place of its own for the state before it: neighbours' are next to each other."""
    scan = kernels.select(device, "triton").ssd

    @settings(max_examples=20, deadline=None)
    @given(lengths=st.lists(st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33, 64, 97]), min_size=1, max_size=6))
    def check(lengths):
        inputs, shape = inputs_for("ssd", [*lengths, 5], device)
        inputs["initial_state"] = torch.randn(len(lengths) + 1, *shape, device=device)
        exact = {
            name: each.double() if torch.is_tensor(each) and each.is_floating_point() else each
            for name, each in inputs.items()
        }
        with torch.no_grad(), poisoned():
            for actual, expected in zip(scan(**inputs), reference.ssd(**exact), strict=True):
                assert relative_rms(actual, expected) < 1e-5

    check()
