"""Sequences laid end to end: what each operation gives for all of them at once is what it gives for each alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_mamba.kernels import chunked, reference, scan

from .test_kernels import assert_same, outputs_and_gradients, scan_inputs, ssd_inputs
from .tiny import relative_rms

LENGTHS = st.lists(st.one_of(st.integers(0, 4), st.integers(0, 40)), max_size=7)
PER_TOKEN = {"u", "delta", "B", "C", "z", "x", "dt"}


def bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def one_by_one(operation, inputs, lengths):
    """Outputs and states of the sequences, each in a call of its own."""
    parts, start = [], 0
    for s, length in enumerate(lengths):
        alone = {k: t[:, start : start + length] if k in PER_TOKEN else t for k, t in inputs.items()}
        alone["initial_state"] = inputs["initial_state"][s : s + 1]
        parts.append(operation(**alone, return_final_state=True))
        start += length
    return torch.cat([y for y, _ in parts], dim=1), torch.cat([h for _, h in parts])


def packed_inputs(make, lengths, *sizes):
    inputs = make(1, sum(lengths), *sizes)
    shape = inputs["initial_state"].shape[1:]
    inputs["initial_state"] = torch.randn(len(lengths), *shape, dtype=torch.float64, requires_grad=True)
    return inputs


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS.filter(len), step=st.integers(1, 60), module=st.sampled_from([reference, chunked]))
@example(lengths=[0, 0], step=1, module=chunked)
@example(lengths=[64, 3, 0, 64, 65], step=20, module=chunked)
def test_selective_scan(lengths, step, module):
    torch.manual_seed(sum(lengths))
    inputs = packed_inputs(scan_inputs, lengths, 3, 2)
    expected = outputs_and_gradients(
        lambda return_final_state, **tensors: one_by_one(reference.selective_scan, tensors, lengths), inputs
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "SCAN_BUFFER", step * 6)
        actual = outputs_and_gradients(module.selective_scan, inputs, cu_seqlens=bounds(lengths))
    assert_same(actual, expected, 1e-12)


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS.filter(len),
    step=st.integers(1, 30),
    groups=st.sampled_from([1, 2, 4]),
    module=st.sampled_from([reference, chunked]),
)
@example(lengths=[0, 0], step=1, groups=1, module=chunked)
def test_ssd(lengths, step, groups, module):
    torch.manual_seed(sum(lengths))
    inputs = packed_inputs(ssd_inputs, lengths, 4, groups)
    expected = outputs_and_gradients(
        lambda return_final_state, **tensors: one_by_one(reference.ssd, tensors, lengths), inputs
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "SSD_CHUNK", step)
        actual = outputs_and_gradients(module.ssd, inputs, cu_seqlens=bounds(lengths))
    assert_same(actual, expected, 1e-11)


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS.filter(len),
    family=st.sampled_from([("selective_scan", scan_inputs, (3, 2)), ("ssd", ssd_inputs, (4, 2))]),
    module=st.sampled_from([reference, chunked]),
    data=st.data(),
)
def test_states_from_a_pool(lengths, family, module, data):
    """Several sequences may start from the same, which then gets the sum of their gradients."""
    torch.manual_seed(sum(lengths))
    name, make, sizes = family
    index = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths))))
    inputs = packed_inputs(make, lengths, *sizes)
    inputs["initial_state"] = torch.randn(3, *inputs["initial_state"].shape[1:]).double().requires_grad_()

    def gathered(initial_state, **tensors):
        return getattr(reference, name)(initial_state=initial_state[index], **tensors)

    expected = outputs_and_gradients(gathered, inputs, cu_seqlens=bounds(lengths))
    actual = outputs_and_gradients(getattr(module, name), inputs, initial_index=index, cu_seqlens=bounds(lengths))
    assert_same(actual, expected, 1e-11)


@pytest.mark.parametrize("module", [reference, chunked])
@pytest.mark.parametrize("family", [("selective_scan", scan_inputs, (3, 2)), ("ssd", ssd_inputs, (4, 2))])
def test_rows_of_a_batch_from_a_pool(module, family):
    name, make, sizes = family
    inputs, index = make(3, 5, *sizes), torch.tensor([1, 2, 1])
    pool = inputs.pop("initial_state")
    expected = getattr(reference, name)(**inputs, initial_state=pool[index], return_final_state=True)
    actual = getattr(module, name)(**inputs, initial_state=pool, initial_index=index, return_final_state=True)
    assert all(relative_rms(*pair) < 1e-12 for pair in zip(actual, expected, strict=True))
    with pytest.raises(ValueError, match="no initial_state"):
        getattr(module, name)(**inputs, initial_index=index)


@pytest.mark.parametrize("module", [reference, chunked])
@pytest.mark.parametrize("family", [("selective_scan", scan_inputs, (3, 2)), ("ssd", ssd_inputs, (4, 2))])
def test_outputs_go_where_they_are_wanted_and_what_is_known_of_sequences_stays(module, family):
    name, make, sizes = family
    inputs = packed_inputs(make, [3, 0, 5], *sizes)
    memo: dict = {}
    with torch.no_grad():
        expected, _ = getattr(reference, name)(**inputs, cu_seqlens=bounds([3, 0, 5]))
        for _ in range(2):
            out = torch.full_like(expected, torch.nan)
            y, _ = getattr(module, name)(**inputs, cu_seqlens=bounds([3, 0, 5]), memo=memo, out=out)
            assert y is out and relative_rms(out, expected) < 1e-12
    assert len(memo) == (module is chunked)


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS.filter(len),
    width=st.integers(1, 4),
    stateful=st.booleans(),
    module=st.sampled_from([reference, chunked]),
)
def test_causal_conv1d(lengths, width, stateful, module):
    torch.manual_seed(sum(lengths))
    shapes = {"x": (1, sum(lengths), 3), "weight": (3, width), "bias": (3,)}
    inputs = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    if stateful:
        inputs["initial_state"] = torch.randn(len(lengths), width - 1, 3, dtype=torch.float64, requires_grad=True)

    def run(**tensors):
        x, state = tensors.pop("x"), tensors.pop("initial_state", [None] * len(lengths))
        return torch.cat(
            [
                reference.causal_conv1d(part, **tensors, initial_state=None if before is None else before[None])
                for part, before in zip(x.split(lengths, dim=1), state, strict=True)
            ],
            dim=1,
        )

    def values_and_gradients(operation, **rows):
        y = operation(**inputs, activation="silu", **rows)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        return dict(zip(["y", *inputs], [y, *torch.autograd.grad(loss, list(inputs.values()))], strict=True))

    assert_same(
        values_and_gradients(module.causal_conv1d, cu_seqlens=bounds(lengths)), values_and_gradients(run), 1e-12
    )


def test_half_precision_goes_in_and_out_and_the_states_stay_float32():
    torch.manual_seed(0)
    lengths = [9, 0, 70, 1]
    for name, make, sizes in (("selective_scan", scan_inputs, (8, 4)), ("ssd", ssd_inputs, (4, 2))):
        inputs = {k: t.detach() for k, t in packed_inputs(make, lengths, *sizes).items()}
        rounded = {k: t if k == "initial_state" else t.bfloat16() for k, t in inputs.items()}
        exact, exact_state = one_by_one(getattr(reference, name), {k: t.double() for k, t in rounded.items()}, lengths)
        y, state = getattr(chunked, name)(**rounded, cu_seqlens=bounds(lengths), return_final_state=True)
        assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
        assert relative_rms(y, exact) < 4e-3 and relative_rms(state, exact_state) < 1e-5


@pytest.mark.parametrize("module", [reference, chunked])
def test_a_row_without_sequences_is_empty(module):
    for operation, inputs in (("selective_scan", scan_inputs(1, 0, 3, 2)), ("ssd", ssd_inputs(1, 0, 4, 2))):
        inputs["initial_state"] = inputs["initial_state"][:0]
        y, state = getattr(module, operation)(**inputs, cu_seqlens=bounds([]), return_final_state=True)
        assert y.shape == next(iter(inputs.values())).shape and state.shape == inputs["initial_state"].shape
    assert module.causal_conv1d(torch.randn(1, 0, 3), torch.randn(3, 4), cu_seqlens=bounds([])).shape == (1, 0, 3)


@pytest.mark.parametrize("module", [reference, chunked])
@pytest.mark.parametrize("operation", ["selective_scan", "ssd", "causal_conv1d"])
def test_what_does_not_go_together_is_refused(module, operation):
    makers = {"selective_scan": (scan_inputs, (3, 2)), "ssd": (ssd_inputs, (4, 2))}
    if operation == "causal_conv1d":
        inputs = {"x": torch.randn(1, 5, 3), "weight": torch.randn(3, 4), "initial_state": torch.randn(2, 3, 3)}
    else:
        make, sizes = makers[operation]
        inputs = packed_inputs(make, [2, 3], *sizes)
    run = getattr(module, operation)
    cu_seqlens = bounds([2, 3])
    if operation != "causal_conv1d":
        with pytest.raises(ValueError, match="no lengths"):
            run(**inputs, cu_seqlens=cu_seqlens, lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match="no seq_idx"):
        run(**inputs, cu_seqlens=cu_seqlens, seq_idx=torch.zeros(1, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="2 entries for the 3 sequences"):
        run(**inputs, cu_seqlens=bounds([2, 2, 1]))
    with pytest.raises(ValueError, match="float32"):
        run(**inputs, cu_seqlens=cu_seqlens.float())
    first = next(iter(inputs))
    with pytest.raises(ValueError, match="2 rows"):
        run(**{**inputs, first: inputs[first].expand(2, *inputs[first].shape[1:])}, cu_seqlens=cu_seqlens)
