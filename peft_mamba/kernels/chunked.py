"""The same operations in PyTorch alone, fast enough to train with: chunks of time, never (B, L, D, N) at once.

Within a chunk everything but the recurrence itself is one tensor operation, and the recurrence is one fused
multiply-add a step, in place. Backward keeps one state a chunk and recomputes the rest. Runs on any device and needs
nothing but PyTorch; shapes and meanings are those of `reference`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .convolution import causal_conv1d
from .reference import (
    Tensor,
    accumulator_dtype,
    first_of_document,
    skip_and_gate,
    step_size,
    zero_padding,
)
from .scan import Scan
from .schedule import Schedule

__all__ = ["causal_conv1d", "selective_scan", "ssd"]

# Tokens a chunk of `ssd`: the score matrices are (SSD_CHUNK, SSD_CHUNK) a head.
SSD_CHUNK = 64


def _without_autocast(function):
    """Run `function` outside autocast, which would put its matrix products into half precision."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@_without_autocast
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`reference.selective_scan`, chunk by chunk. First derivatives only."""
    dtype = accumulator_dtype(u)
    dt = step_size(delta, delta_bias, lengths)
    x = u.to(dtype)
    h = x.new_zeros(len(x), *A.shape) if initial_state is None else initial_state.to(dtype)
    schedule = Schedule.of(*x.shape[:2], first_of_document(seq_idx))
    y, final_state = Scan.apply(dt, x, A.to(dtype), B.to(dtype), C.to(dtype), h, schedule)
    # Without gradients in place: the scan's output is nobody else's.
    y = skip_and_gate(y, x, D, z) if torch.is_grad_enabled() else _skip_and_gate_(y, x, D, z)
    return y.to(u.dtype), final_state if return_final_state else None


def _skip_and_gate_(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """`skip_and_gate` that overwrites y, and gives a result with the tokens of a row side by side in memory."""
    if D is not None:
        y.addcmul_(x, D.to(y.dtype))
    return y.contiguous() if z is None else F.silu(z.to(y.dtype)).mul_(y)


@_without_autocast
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`reference.ssd` in the block form of 2405.21060, section 6: attention within a chunk, a state between chunks."""
    dtype = accumulator_dtype(x)
    dt = zero_padding(dt.to(dtype), lengths)
    u = x.to(dtype)
    batch, length, heads, _ = u.shape
    groups = B.shape[2]
    values, exponent = u * dt[..., None], dt * A.to(dtype)
    B, C = B.to(dtype), C.to(dtype)
    h = u.new_zeros(batch, *u.shape[2:], B.shape[-1]) if initial_state is None else initial_state.to(dtype)
    starts = first_of_document(seq_idx)
    documents = None if starts is None else starts.cumsum(1)
    outputs = []
    for start in range(0, length, SSD_CHUNK):
        chunk = slice(start, min(start + SSD_CHUNK, length))
        a, v = exponent[:, chunk].transpose(1, 2), values[:, chunk]  # (B, H, T), (B, T, H, P)
        Bc, Cc = (t[:, chunk].repeat_interleave(heads // groups, dim=2) for t in (B, C))
        decay = torch.exp(_segment_sums(a))  # (B, H, T, T): from just after token s to token t, zero above the diagonal
        into = torch.exp(a.cumsum(-1))  # (B, H, T): from before the chunk to token t
        if documents is not None:
            here = documents[:, chunk]
            before = documents[:, max(start - 1, 0), None]
            decay = decay * (here[:, None, :, None] == here[:, None, None, :])
            into = into * (here == before)[:, None]
        scores = torch.einsum("bthn,bshn->bhts", Cc, Bc) * decay
        y = torch.einsum("bhts,bshp->bthp", scores, v)
        outputs.append(y + torch.einsum("bthn,bhpn,bht->bthp", Cc, h, into))
        h = into[:, :, -1, None, None] * h + torch.einsum("bhs,bshn,bshp->bhpn", decay[:, :, -1], Bc, v)
    y = torch.cat(outputs, dim=1) if outputs else u
    if D is not None:
        y = y + u * D.to(dtype)[:, None]
    return y.to(x.dtype), h if return_final_state else None


def _segment_sums(a: Tensor) -> Tensor:
    """(..., T) to (..., T, T): the sum of a over s+1 .. t, -inf where s > t.

    Sums each segment by itself: a difference of two cumulative sums would cancel where both are large.
    """
    size = a.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=a.device).tril()
    strictly_lower = lower.tril(-1)
    sums = a[..., None].expand(*a.shape, size).masked_fill(~strictly_lower, 0.0).cumsum(-2)
    return sums.masked_fill(~lower, -torch.inf)
