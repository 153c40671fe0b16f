"""Mamba-2's Triton scan and its single step against the float64 reference, on small shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_mamba import kernels
from peft_mamba.kernels import reference

from ..peft_mamba.tiny import relative_rms
from .cases import ROWS, TOLERANCE, compare, run_scan, ssd_case


@pytest.fixture(autouse=True)
def short_chunks(device, monkeypatch):
    """Several chunks, tiles and blocks of heads for small inputs too."""
    from peft_mamba.kernels.triton import ssd_plan

    if device == "cpu":
        for name in ("CHUNK", "CHUNK_FLOAT32", "STATE_COLUMNS", "STATE_COLUMNS_FLOAT32", "LEAST"):
            monkeypatch.setattr(ssd_plan, name, 16)
        monkeypatch.setattr(ssd_plan, "PROGRAMS", 4)


@pytest.mark.parametrize(
    "dtype, kind",
    [*((torch.float32, kind) for kind in ROWS), *((torch.bfloat16, kind) for kind in ROWS), (torch.float16, "padded")],
)
def test_outputs_and_gradients(device, dtype, kind):
    torch.manual_seed(0)
    compare(run_scan, "ssd", *ssd_case(kind, 1, 35, 3, 1, 6, 20), dtype, device)


@pytest.mark.parametrize("wanted, segments, span", [(100, 5, 1), (12, 2, 3)])
@pytest.mark.parametrize(
    "dtype, kind, initial",
    [(torch.float32, "padded", True), (torch.float32, "documents", False), (torch.bfloat16, "whole", True)],
)
def test_long_sequences_in_segments(device, monkeypatch, dtype, kind, initial, wanted, segments, span):
    from peft_mamba.kernels.triton import ssd, ssd_plan

    monkeypatch.setattr(ssd_plan, "SEGMENTS_WANTED", wanted)
    monkeypatch.setattr(ssd_plan, "LEAST_SPAN", 1)
    joined, join = [], ssd._join
    monkeypatch.setattr(
        ssd, "_join", lambda plan, *rest: joined.append((plan.segments, plan.span)) or join(plan, *rest)
    )
    chunk = ssd_plan.CHUNK if dtype == torch.bfloat16 else ssd_plan.CHUNK_FLOAT32
    torch.manual_seed(0)
    compare(run_scan, "ssd", *ssd_case(kind, 2, 4 * chunk + 3, 3, 1, 6, 20, initial=initial), dtype, device)
    assert joined == [(segments, span)] * 3  # the states of forward, those of backward, and their gradients


def test_without_a_gradient_of_D(device):
    """As under a LoRA: nothing is summed for it."""
    torch.manual_seed(0)
    compare(run_scan, "ssd", *ssd_case("packed", 1, 35, 3, 1, 6, 20), torch.float32, device, frozen=("D",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_where_the_state_decays_within_a_token(device, dtype):
    """Left is a token's pair with itself, which is in both of the sums for the exponents and must cancel out."""
    torch.manual_seed(0)
    sizes = (300, 3, 1, 64, 128) if device == "cuda" else (35, 3, 1, 6, 20)
    inputs, rows = ssd_case("whole", 1, *sizes)
    inputs["A"] *= 20  # its own gradient is next to nothing
    compare(run_scan, "ssd", inputs, rows, dtype, device, frozen=("A",))


def test_heads_of_a_block_keep_their_own_precision(device):
    """Heads share what B and C get; the step size of one that is a million times smaller loses nothing by that."""
    torch.manual_seed(0)
    inputs, rows = ssd_case("whole", 1, 40, 4, 1, 6, 20)
    scale = torch.tensor([1, 1e-6, 1, 1e-6], dtype=torch.float64)
    inputs["x"] *= scale[:, None]
    results = []
    for operation, to in ((reference.ssd, {}), (kernels.select(device, "triton").ssd, {"device": device})):
        given = {n: t.to(dtype=torch.float64 if not to else torch.float32, **to) for n, t in inputs.items()}
        given["dt"].requires_grad_()
        given["initial_state"] = given["initial_state"] * scale[:, None, None].to(given["x"])
        y, _ = operation(**given, **rows, return_final_state=True)
        torch.manual_seed(1)
        weight = torch.randn(y.shape, dtype=torch.float64).to(y)
        results.append(torch.autograd.grad((y * weight).sum(), given["dt"])[0])
    for head in range(4):
        assert relative_rms(results[1][..., head], results[0][..., head]) < 1e-5


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(ROWS),
    batch=st.integers(1, 2),
    length=st.integers(0, 30),
    heads_and_groups=st.sampled_from([(1, 1), (2, 2), (4, 2)]),
    sizes=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    initial=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(device, kind, batch, length, heads_and_groups, sizes, initial, seed):
    torch.manual_seed(seed)
    inputs, rows = ssd_case(kind, batch, length, *heads_and_groups, *sizes, initial=initial)
    compare(run_scan, "ssd", inputs, rows, torch.float32, device)


def test_states_that_overflow_float16_stay_finite(device):
    torch.manual_seed(0)
    inputs, rows = ssd_case("whole", 1, 33, 1, 1, 16, 16)
    inputs["initial_state"] = 1e5 * (1 + torch.rand_like(inputs["initial_state"]))
    inputs["C"] *= 1e-3
    inputs["A"] *= 0.01
    inputs = {name: tensor.to(device, torch.float32) for name, tensor in inputs.items()}
    low = {name: t.half() if name in ("x", "B", "C") else t for name, t in inputs.items()}
    y, _ = kernels.select(device, "triton").ssd(**low)
    exact, _ = reference.ssd(**{name: tensor.cpu().double() for name, tensor in low.items()})
    assert relative_rms(y, exact) < TOLERANCE[torch.float16]


def test_same_inputs_same_bits(device):
    torch.manual_seed(0)
    inputs, _ = ssd_case("whole", 2, 37, 2, 1, 8, 8)
    given = {name: tensor.to(device, torch.float32).requires_grad_() for name, tensor in inputs.items()}

    def gradients():
        y, state = run_scan(kernels.select(device, "triton").ssd, **given)
        return torch.autograd.grad(y.square().sum() + state.sum(), list(given.values()))

    assert all(torch.equal(*pair) for pair in zip(gradients(), gradients(), strict=True))


def test_one_output_without_a_gradient(device):
    """A loss on the state alone, as on y alone."""
    torch.manual_seed(0)
    inputs, _ = ssd_case("whole", 2, 20, 2, 1, 8, 8)
    for output in (0, 1):
        results = []
        for operation, to in ((reference.ssd, {}), (kernels.select(device, "triton").ssd, {"device": device})):
            given = {n: t.to(dtype=torch.float64 if not to else torch.float32, **to) for n, t in inputs.items()}
            given["B"].requires_grad_()
            results.append(torch.autograd.grad(run_scan(operation, **given)[output].square().sum(), given["B"])[0])
        assert relative_rms(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("padded", [False, True])
class TestStep:
    """A single token without gradients: the paths that generation takes."""

    lengths = torch.tensor([1, 0, 1])

    def check(self, operation, exact, inputs, dtype, device, padded, float32):
        given = {n: t.to(device, torch.float32 if n in float32 else dtype) for n, t in inputs.items()}
        exactly = {name: tensor.cpu().double() for name, tensor in given.items()}
        rows = {"lengths": self.lengths} if padded else {}
        before = given.get("initial_state", torch.zeros(0)).clone()
        y, state = operation(**given, **{n: t.to(device) for n, t in rows.items()}, return_final_state=True)
        expected, expected_state = exact(**exactly, **rows, return_final_state=True)
        assert y.dtype == dtype and relative_rms(y, expected) < TOLERANCE[dtype]
        assert state.dtype == torch.float32 and relative_rms(state, expected_state) < 1e-5
        assert torch.equal(given.get("initial_state", torch.zeros(0)), before)  # it belongs to the caller

    def test_ssd(self, device, dtype, initial, padded):
        torch.manual_seed(0)
        inputs, _ = ssd_case("whole", 3, 1, 6, 2, 20, 10, initial=initial)
        operation = kernels.select(device, "triton").ssd
        self.check(operation, reference.ssd, inputs, dtype, device, padded, {"A", "D", "dt", "initial_state"})

    def test_selective_scan(self, device, dtype, initial, padded):
        from peft_mamba.kernels.triton.step import selective_step

        torch.manual_seed(0)
        inputs = {
            "u": torch.randn(3, 1, 37),
            "delta": torch.randn(3, 1, 37) - 14,  # step sizes of 1e-6, of which log(1 + exp) loses a tenth
            "A": -4 * torch.rand(37, 6),
            "B": torch.randn(3, 1, 6),
            "C": torch.randn(3, 1, 6),
            "D": torch.randn(37),
            "z": torch.randn(3, 1, 37),
            "delta_bias": torch.randn(37),
            **({"initial_state": torch.randn(3, 37, 6)} if initial else {}),
        }
        float32 = {"A", "D", "delta_bias", "initial_state"}
        self.check(selective_step, reference.selective_scan, inputs, dtype, device, padded, float32)
