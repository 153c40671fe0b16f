"""Inputs of the selective scan drawn at random, and the comparison of a kernel with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from peft_mamba.kernels import reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@dataclass(frozen=True)
class Case:
    """A call of the scan. `rows` is "plain", "seq_idx", "lengths", or "packed" (sequences end to end)."""

    batch: int = 2
    length: int = 13
    channels: int = 40
    states: int = 16
    dtype: torch.dtype = torch.float32
    rows: str = "plain"
    stateful: bool = False
    without: tuple[str, ...] = ()
    strided: bool = False
    seed: int = 0


def draw(case: Case, device: str) -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor]]:
    """(tensors that may want gradients, what describes the rows)."""
    rng = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    batch, length, channels, states = case.batch, case.length, case.channels, case.states
    rows: dict[str, torch.Tensor] = {}
    sequences = batch
    if case.rows == "packed":
        cuts = torch.randint(0, batch * length + 1, (batch - 1,), generator=rng).sort().values
        rows["cu_seqlens"] = torch.cat([torch.tensor([0]), cuts, torch.tensor([batch * length])]).to(torch.int32)
        batch, length = 1, batch * length
    elif case.rows == "seq_idx":
        rows["seq_idx"] = (torch.rand(batch, length, generator=rng) < 0.2).cumsum(1)
    elif case.rows == "lengths":
        rows["lengths"] = torch.randint(0, length + 1, (batch,), generator=rng)
    wide = normal(batch, length, 2 * channels)
    tensors = {
        "u": normal(batch, length, channels).to(case.dtype),
        "delta": (normal(batch, length, channels) - 2).to(case.dtype),
        "A": -torch.exp(0.5 * normal(channels, states)),
        "B": normal(batch, length, states).to(case.dtype),
        "C": normal(batch, length, states).to(case.dtype),
        "D": normal(channels),
        "z": wide.to(case.dtype)[..., channels:] if case.strided else wide[..., channels:].to(case.dtype).contiguous(),
        "delta_bias": 0.5 * normal(channels),
        "initial_state": normal(sequences, channels, states) if case.stateful else None,
    }
    tensors |= dict.fromkeys(case.without)
    move = lambda x: None if x is None else x.to(device)  # noqa: E731
    return {name: move(x) for name, x in tensors.items()}, {name: x.to(device) for name, x in rows.items()}


def run(function: Callable, tensors: dict, rows: dict, stateful: bool, dtype: torch.dtype | None = None) -> dict:
    """Outputs and gradients for one random gradient of the outputs, the same for every function."""
    leaves = {
        name: None if x is None else (x if dtype is None else x.to(dtype)).detach().requires_grad_()
        for name, x in tensors.items()
    }
    y, state = function(
        *(leaves[name] for name in TENSORS),
        initial_state=leaves["initial_state"],
        return_final_state=stateful,
        **rows,
    )
    rng = torch.Generator().manual_seed(1)
    d_y = torch.randn(y.shape, generator=rng).to(tensors["u"].dtype).to(y.device, y.dtype)
    outputs, gradients = [y], [d_y]
    if stateful:
        outputs.append(state)
        gradients.append(torch.randn(state.shape, generator=rng).to(state.device, state.dtype))
    wanted = {name: x for name, x in leaves.items() if x is not None}
    found = torch.autograd.grad(outputs, list(wanted.values()), gradients, allow_unused=True)
    result = {f"d_{name}": gradient for name, gradient in zip(wanted, found, strict=True)}
    return {"y": y.detach(), **({"state": state.detach()} if stateful else {}), **result}


def _by_sequence(*args, initial_state, return_final_state, cu_seqlens=None, **rows):
    """The reference, sequence by sequence where they are packed: it must not share what it is to be compared with."""
    if cu_seqlens is None:
        return reference.selective_scan(
            *args, initial_state=initial_state, return_final_state=return_final_state, **rows
        )
    parts = []
    for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        cut = [x[:, start:stop] if x is not None and x.ndim == 3 else x for x in args]
        before = None if initial_state is None else initial_state[i : i + 1]
        parts.append(reference.selective_scan(*cut, initial_state=before, return_final_state=True))
    return torch.cat([y for y, _ in parts], 1), torch.cat([h for _, h in parts])


def check(function: Callable, case: Case, device: str) -> None:
    """Raises AssertionError where an output or gradient is further from float64 than the inputs' dtype allows."""
    # A loop over tokens is many small operations, which a CPU is done with sooner than a GPU.
    expected = run(_by_sequence, *draw(case, "cpu"), case.stateful, torch.float64)
    actual = run(function, *draw(case, device), case.stateful)
    for name, want in expected.items():
        got = None if actual[name] is None else actual[name].cpu()
        if want is None or want.numel() == 0:
            assert got is None or got.numel() == 0 or not got.any(), f"{name}: {case}"
            continue
        assert got.shape == want.shape and torch.isfinite(got).all(), f"{name}: {case}"
        scale = want.pow(2).mean().sqrt()
        if name == "d_delta_bias":
            # A sum over tokens, whose rounding error its terms bound: for few channels they cancel out now and then.
            scale = torch.maximum(scale, expected["d_delta"].abs().sum((0, 1)).pow(2).mean().sqrt())
        error = (got.double() - want).pow(2).mean().sqrt() / scale if scale else got.abs().max()
        assert error <= TOLERANCE[case.dtype], f"{name}: relative RMS error {error:.1e}: {case}"
