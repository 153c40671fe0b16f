"""Inputs of every kind for the Triton kernels, and the comparison with the float64 reference.

`tests/triton` takes small ones, which run in the interpreter too, `tests/gpu` many and large ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peft_mamba.kernels import chunked, reference

from ..peft_mamba.tiny import relative_rms

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# How the rows of a batch are made up: whole, with padding behind, several documents a row, or laid end to end.
ROWS = ("whole", "padded", "documents", "packed")
# Never in half precision.
FLOAT32 = {"A", "D", "dt", "delta_bias", "weight", "bias"}


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN until something is written to them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def bounds(length: int) -> torch.Tensor:
    """cu_seqlens of a row: random cuts, with an empty sequence and, where there is room, one of a single token."""
    cuts = sorted(torch.randint(0, length + 1, (3,)).tolist())
    return torch.tensor([0, *cuts, cuts[-1], min(cuts[-1] + 1, length), length], dtype=torch.int32)


def rows_of(kind: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    """The keyword arguments that describe such rows."""
    if kind == "padded":
        return {"lengths": torch.randint(0, length + 1, (batch,))}
    if kind == "documents":  # numbers that come back and are negative are boundaries as well
        changes = torch.rand(batch, length) < 0.15
        return {"seq_idx": (changes.cumsum(1) % 3 - 1).to(torch.int32)}
    return {"cu_seqlens": bounds(length)} if kind == "packed" else {}


def states_of(batch: int, rows: dict[str, torch.Tensor]) -> int:
    """How many states there are: one a row, or one a sequence of a packed row."""
    return len(rows["cu_seqlens"]) - 1 if "cu_seqlens" in rows else batch


def conv_case(
    kind: str, batch: int, length: int, channels: int, width: int, *, bias: bool = True, initial: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs of the convolution, in float64, and the rows' description."""
    batch = 1 if kind == "packed" else batch
    rows = rows_of("whole" if kind == "padded" else kind, batch, length)  # padding is behind what a convolution sees
    inputs = {
        # The latter half of something wider, as a projection's output is; the test slices it.
        "x": torch.randn(batch, length, 2 * channels, dtype=torch.float64),
        "weight": torch.randn(channels, width, dtype=torch.float64),
    }
    if bias:
        inputs["bias"] = torch.randn(channels, dtype=torch.float64)
    if initial and width > 1:
        inputs["initial_state"] = torch.randn(states_of(batch, rows), width - 1, channels, dtype=torch.float64)
    return inputs, rows


def run_conv(operation: Callable, activation: str | None, **inputs: Any) -> tuple[torch.Tensor]:
    x = inputs.pop("x")
    return (operation(x[..., x.shape[2] // 2 :], activation=activation, **inputs),)


def ssd_case(
    kind: str,
    batch: int,
    length: int,
    heads: int,
    groups: int,
    head_size: int,
    state_size: int,
    *,
    initial: bool = True,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs of Mamba-2's scan, in float64, and the rows' description."""
    batch = 1 if kind == "packed" else batch
    rows = rows_of(kind, batch, length)
    random = functools.partial(torch.randn, dtype=torch.float64)
    inputs = {
        "x": random(batch, length, heads, head_size),
        "dt": torch.rand(batch, length, heads, dtype=torch.float64),
        "A": -0.2 - 2 * torch.rand(heads, dtype=torch.float64),
        "B": random(batch, length, groups, state_size),
        "C": random(batch, length, groups, state_size),
        "D": random(heads),
    }
    if initial:
        inputs["initial_state"] = random(states_of(batch, rows), heads, head_size, state_size)
    return inputs, rows


def run_scan(operation: Callable, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return operation(**inputs, return_final_state=True)


def compare(
    run: Callable, names: str, inputs: dict[str, torch.Tensor], rows: dict[str, torch.Tensor], dtype: torch.dtype,
    device: str, implementation: str = "triton", frozen: tuple[str, ...] = (), tolerance: float | None = None,
) -> None:  # fmt: skip
    """Hold outputs and all gradients of a kernel against the reference in float64, on the same rounded inputs.

    Args:
        run: calls the operation, its first argument, with the inputs and rows, and returns its outputs.
        names: of the operation.
        frozen: inputs that need no gradient.
    """
    from peft_mamba import kernels

    # The reference takes a step of Python for each token; `chunked` is held against it to 1e-12 elsewhere.
    length = next(iter(inputs.values())).shape[1]
    exact = getattr(reference if length <= 40 else chunked, names)
    operation = getattr(kernels.select(device, implementation), names)
    given, rounded = {}, {}
    for name, tensor in inputs.items():
        low = torch.float32 if name in FLOAT32 or (name == "initial_state" and names != "causal_conv1d") else dtype
        given[name] = tensor.to(device, low).requires_grad_(name not in frozen)
        rounded[name] = given[name].detach().cpu().double().requires_grad_(name not in frozen)
    with poisoned():
        outputs = run(operation, **given, **{name: tensor.to(device) for name, tensor in rows.items()})
        weights = [torch.randn_like(output) for output in outputs]
        wanted = {name: tensor for name, tensor in given.items() if name not in frozen}
        # No state depends on any input where there are no tokens and no state before them.
        differentiable = [i for i, output in enumerate(outputs) if output.requires_grad]
        gradients = _gradients(outputs, list(wanted.values()), weights, differentiable)
    expected = run(exact, **rounded, **rows)
    exact_gradients = _gradients(
        expected, [rounded[name] for name in wanted], [w.cpu().double() for w in weights], differentiable
    )
    compared = zip(
        [*(f"output {i}" for i in range(len(outputs))), *(f"gradient of {name}" for name in wanted)],
        [*outputs, *gradients],
        [*expected, *exact_gradients],
        strict=True,
    )
    for name, actual, right in compared:
        if right is not None and right.numel() and right.any():
            error = relative_rms(actual, right)
            summed = names == "ssd" and name in ("gradient of A", "gradient of D")
            if summed and error >= (tolerance or TOLERANCE[dtype]):
                error *= (right.norm() / _magnitudes(name[-1], run, rounded, rows, weights).norm()).item()
            # A single number is no mean over many: its error may well be several times the typical one.
            most = (tolerance or TOLERANCE[dtype]) * (4 if right.numel() == 1 else 1)
            assert error < most, f"{name} is off by {error:.1e}"
        else:
            # dA is a sum of differences, which leave a rounding error where they cancel out.
            most = TOLERANCE[dtype] if name == "gradient of A" else 0.0
            assert actual is None or not actual.numel() or actual.abs().max() <= most, name


def _magnitudes(name: str, run: Callable, inputs: dict, rows: dict, weights: list) -> torch.Tensor:
    """(H,): the sum of magnitudes of what single channels of single tokens add to the gradient of A or D.

    That is what bounds the rounding error of a sum, whose terms may cancel out: for few of them they do now and then.
    """
    dy, *of_states = [w.cpu().double() for w in weights]
    if name == "D":
        return (dy * inputs["x"].detach()).abs().sum((0, 1, 3))
    heads, channels = inputs["x"].shape[2:]
    apart = {}  # every channel a head of its own
    for key, tensor in inputs.items():
        tensor = tensor.detach()
        if key in ("A", "dt", "D"):
            tensor = tensor.repeat_interleave(channels, -1)
        elif key not in ("B", "C"):
            tensor = tensor.flatten(2, 3).unsqueeze(3) if key == "x" else tensor.flatten(1, 2).unsqueeze(2)
        apart[key] = tensor
    A = apart["A"].expand_as(apart["dt"]).clone().requires_grad_()  # `chunked` multiplies it with dt
    outputs = run(chunked.ssd, **apart | {"A": A}, **rows)
    along = [dy.flatten(2, 3).unsqueeze(3), *(w.flatten(1, 2).unsqueeze(2) for w in of_states)]
    return torch.autograd.grad(outputs, A, along)[0].abs().sum((0, 1)).view(heads, channels).sum(1)


def _gradients(outputs: Any, inputs: list, weights: list, differentiable: list[int]) -> tuple:
    chosen, along = [outputs[i] for i in differentiable], [weights[i] for i in differentiable]
    return torch.autograd.grad(chosen, inputs, along, allow_unused=True) if inputs else ()
