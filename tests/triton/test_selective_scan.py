"""The Triton scan against the reference in float64, outputs and every gradient."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .scan_cases import Case, check, draw, run

CASES = {
    "plain": Case(),
    "fewer channels than lanes": Case(channels=7, states=5, length=3),
    "several checkpoints": Case(batch=1, length=40, channels=33, states=8),
    "no z": Case(without=("z",)),
    "no D, no bias": Case(without=("D", "delta_bias")),
    "z is half of a wider tensor": Case(strided=True, length=5),
    "one token": Case(length=1, stateful=True),
    "no tokens": Case(length=0, stateful=True),
    "states": Case(stateful=True),
    "documents": Case(rows="seq_idx", stateful=True, length=20),
    "padding": Case(rows="lengths", stateful=True, batch=3, length=11),
    "packed": Case(rows="packed", stateful=True, batch=4, length=9),
    "few states": Case(states=3, length=6),
    "many states": Case(states=64, channels=32, length=4),
    "bf16": Case(dtype=torch.bfloat16, length=21),
    "fp16": Case(dtype=torch.float16, length=21),
    "segments": Case(batch=1, length=80, channels=8, states=4, stateful=True),
    "segments of several blocks": Case(batch=1, length=80, channels=40, states=4, stateful=True),
    "segments with documents": Case(batch=1, length=80, channels=8, states=4, stateful=True, rows="seq_idx"),
    "segments of packed rows": Case(batch=2, length=50, channels=8, states=4, stateful=True, rows="packed"),
    "segments with padding": Case(batch=1, length=80, channels=8, states=4, stateful=True, rows="lengths"),
}


@pytest.fixture(scope="module")
def scan():
    return pytest.importorskip("peft_mamba.kernels.triton.selective_scan")


@pytest.mark.parametrize("name", CASES)
def test_against_float64(scan, device, name, monkeypatch):
    monkeypatch.setattr(scan, "SHORTEST_SEGMENT", 32)
    monkeypatch.setattr(scan, "CHAIN_SEGMENTS", 2)  # fewer than there are
    check(scan.selective_scan, CASES[name], device)


@pytest.mark.parametrize(
    ("shape", "states", "dtypes", "apart", "item"),
    [
        ((2, 5, 64), 16, (torch.bfloat16, torch.bfloat16), 64, 2),
        ((2, 5, 64), 16, (torch.float16, torch.bfloat16), 64 + 8, 2),
        ((2, 5, 32), 11, (torch.float32, torch.float32), 32 + 4, 4),  # 11 states are computed as 16
        ((2, 1, 64), 16, (torch.bfloat16, torch.bfloat16), 64, 2),
        ((2, 5, 40), 16, (torch.bfloat16, torch.bfloat16), 40, 0),  # the last program's rows end early
        ((2, 5, 64), 32, (torch.bfloat16, torch.bfloat16), 64, 0),
        ((2, 5, 64), 8, (torch.bfloat16, torch.bfloat16), 64, 0),
        ((2, 5, 64), 16, (torch.bfloat16, torch.float32), 64, 0),
        ((2, 5, 64), 16, (torch.bfloat16, torch.bfloat16), 64 + 4, 0),  # every other row begins within a piece
    ],
)
def test_rows_are_copied_ahead_where_they_are_whole_pieces(scan, monkeypatch, shape, states, dtypes, apart, item):
    monkeypatch.setattr(scan, "_copies", lambda device: True)
    batch, length, channels = shape
    u = torch.zeros(shape, dtype=dtypes[0])
    z = torch.zeros(batch, length, apart, dtype=dtypes[1])[..., :channels]
    layout = scan._Layout.of(u, states, None)
    B, C = torch.zeros(2, batch, length, 16)
    assert layout.ring(u, u, z, states=(B, C)) == item
    if item:
        assert layout.ring(u, u, None, states=(B, C)) == item
        assert layout.ring(u, torch.zeros(u.numel() + 1, dtype=u.dtype)[1:].view(shape), z, states=(B, C)) == 0
        assert layout.ring(u, u, z, states=(B, torch.zeros(C.numel() + 1)[1:].view_as(C))) == 0
        monkeypatch.setattr(scan, "_copies", lambda device: False)
        assert layout.ring(u, u, z, states=(B, C)) == 0


@pytest.mark.parametrize("where", ["neighbours", "apart", "the other way round", "of two dtypes", "padded"])
def test_neighbours_are_converted_at_once(scan, where):
    """B and C as parts of x_proj's output: the numbers are those of each alone, from one kernel where they can be."""
    states = 3 if where == "padded" else 4
    _, B, C = torch.randn(2, 5, 7 + 2 * states).bfloat16().split([7, states, states], dim=-1)
    if where == "apart":
        C = C.clone()
    elif where == "the other way round":
        B, C = C, B
    elif where == "of two dtypes":
        C = C.view(torch.float16)
    layout = scan._Layout.of(torch.zeros(2, 5, 8), states, None)
    made = layout.per_token(B, C)
    for got, part in zip(made, (B, C), strict=True):
        assert got.is_contiguous() and got.dtype == torch.float32 and got.shape == (2, 5, 4)
        assert torch.equal(got[..., :states], part.float()) and not got[..., states:].any()
    together = made[0].untyped_storage().data_ptr() == made[1].untyped_storage().data_ptr()
    assert together == (where == "neighbours")


@settings(max_examples=4, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(0, 20),
    channels=st.integers(1, 70),
    rows=st.sampled_from(["plain", "seq_idx", "lengths", "packed"]),
    stateful=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(scan, device, batch, length, channels, rows, stateful, seed):
    check(scan.selective_scan, Case(batch, length, channels, 4, rows=rows, stateful=stateful, seed=seed), device)


def test_several_launches_of_backward_give_the_same(scan, device, monkeypatch):
    case = Case(batch=5, length=9, stateful=True, rows="packed", states=4)
    tensors, rows = draw(case, device)
    whole = run(scan.selective_scan, tensors, rows, True)
    monkeypatch.setattr(scan, "BACKWARD_PROGRAMS", 4)
    parts = run(scan.selective_scan, tensors, rows, True)
    for name, want in whole.items():
        torch.testing.assert_close(parts[name], want, rtol=1e-5, atol=1e-5, msg=name)


def test_only_wanted_gradients(scan, device):
    tensors, _ = draw(replace(CASES["plain"], length=4), device)
    tensors.pop("initial_state")
    leaves = {name: x.detach().requires_grad_(name in ("u", "z")) for name, x in tensors.items()}
    y, state = scan.selective_scan(*leaves.values())
    assert state is None
    y.sum().backward()
    assert {name for name, x in leaves.items() if x.grad is not None} == {"u", "z"}


def test_packed_rows_are_checked(scan, device):
    tensors, _ = draw(CASES["plain"], device)
    tensors.pop("initial_state")
    bounds = torch.tensor([0, 13], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="2 rows"):
        scan.selective_scan(*tensors.values(), cu_seqlens=bounds)
