"""The same operations in PyTorch alone, fast enough to train with: chunks of time, never (B, L, D, N) at once.

Runs on any device and needs nothing but PyTorch; shapes and meanings are those of `reference`. The parts of Mamba-1's
scan and the convolution are in `scan` and `convolution`.

Sequences of different lengths in a packed row run side by side, the longest first, without padding: `selective_scan`
takes at each step the tokens of those that are as long (see `schedule`), `ssd` takes pieces of about the same length
together.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from .convolution import causal_conv1d
from .reference import (
    Tensor,
    accumulator_dtype,
    check_packed,
    first_of_document,
    gathers,
    kept_in,
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


@gathers
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
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    memo: dict | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`reference.selective_scan`, chunk by chunk. First derivatives only."""
    dtype = accumulator_dtype(u)
    dt = step_size(delta, delta_bias, lengths)
    x = u.to(dtype)
    if cu_seqlens is not None:
        check_packed(u, cu_seqlens, initial_state, lengths, seq_idx)
        schedule = kept_in(memo, "schedule", lambda: Schedule.packed(cu_seqlens))
    else:
        schedule = Schedule.of(x.shape[0], x.shape[1], first_of_document(seq_idx))
    h = x.new_zeros(schedule.states, *A.shape) if initial_state is None else initial_state.to(dtype)
    y, h = Scan.apply(dt, x, A.to(dtype), B.to(dtype), C.to(dtype), h, schedule)
    return _skip_and_gate(y, x, D, z).to(u.dtype), h if return_final_state else None


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """`reference.skip_and_gate` for a y that is nobody else's: overwritten where no gradient is wanted.

    The bits are the same either way, as a recomputation under gradient checkpointing needs.
    """
    keep = torch.is_grad_enabled()
    if D is not None:
        y = torch.addcmul(y, x, D.to(y.dtype), out=None if keep else y)
    if z is None:
        return y.contiguous()
    gate = F.silu(z.to(y.dtype))
    return torch.mul(gate, y, out=None if keep else gate)


@gathers
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
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    memo: dict | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`reference.ssd` in the block form of 2405.21060, section 6: attention within a chunk, a state between chunks."""
    dtype = accumulator_dtype(x)
    dt = zero_padding(dt.to(dtype), lengths)
    u = x.to(dtype)
    batch, length = u.shape[:2]
    if cu_seqlens is not None:
        batch = check_packed(x, cu_seqlens, initial_state, lengths, seq_idx)
    B, C = B.to(dtype), C.to(dtype)
    values, exponent = u * dt[..., None], dt * A.to(dtype)
    h = u.new_zeros(batch, *u.shape[2:], B.shape[-1]) if initial_state is None else initial_state.to(dtype)
    if cu_seqlens is not None:
        y, h = _packed_ssd(values[0], exponent[0], B[0], C[0], h, cu_seqlens, memo)
    else:
        starts = first_of_document(seq_idx)
        documents = None if starts is None else starts.cumsum(1)
        outputs = []
        for start in range(0, length, SSD_CHUNK):
            chunk = slice(start, min(start + SSD_CHUNK, length))
            here = before = None
            if documents is not None:
                here, before = documents[:, chunk], documents[:, max(start - 1, 0), None]
            y, h = _ssd_chunk(values[:, chunk], exponent[:, chunk], B[:, chunk], C[:, chunk], h, here, before)
            outputs.append(y)
        y = torch.cat(outputs, dim=1) if outputs else u
    if D is not None:
        y = torch.addcmul(y, u, D.to(dtype)[:, None])
    return y.to(x.dtype), h if return_final_state else None


def _ssd_chunk(
    v: Tensor, a: Tensor, B: Tensor, C: Tensor, h: Tensor, here: Tensor | None = None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and final state of one chunk: v = dt·x (B, T, H, P), a = dt·A (B, T, H), B, C (B, T, G, N), h before it.

    here, before: the documents of its tokens (B, T) and of the token before it (B, 1).
    """
    batch, length, heads, channels = v.shape
    groups, states = B.shape[2:]
    sums = _cumulative(a.transpose(1, 2))
    decay = _between(sums, v.dtype)  # (B, H, T, T): from just after token s to token t, zero above the diagonal
    into = torch.exp2(sums).to(v.dtype)  # (B, H, T): from before the chunk to token t
    if here is not None and before is not None:
        decay = decay * (here[:, None, :, None] == here[:, None, None, :])
        into = into * torch.eq(here, before)[:, None]
    # Heads of a group share B and C: one product for all of them, (B, G, T, N) with (B, G, N, heads · P).
    B, C = B.transpose(1, 2), C.transpose(1, 2)
    scores = (C @ B.mT)[:, :, None] * decay.unflatten(1, (groups, -1))
    within = scores.flatten(1, 2) @ v.transpose(1, 2)
    h_rows = h.reshape(batch, groups, -1, states)
    carried = (C @ h_rows.mT).unflatten(-1, (-1, channels)).transpose(1, 2).reshape(batch, length, heads, channels)
    y = torch.addcmul(within.transpose(1, 2), carried, into.transpose(1, 2)[..., None])
    remaining = (v * decay[:, :, -1].transpose(1, 2)[..., None]).reshape(batch, length, groups, -1).transpose(1, 2)
    added = (remaining.mT @ B).view(batch, heads, channels, states)
    return y, torch.addcmul(added, h, into[:, :, -1, None, None])


def _by_length(cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """From the longest sequence to the shortest: its number, length and first token, and the lengths on the host."""
    lengths = cu_seqlens.diff().long()
    order = torch.argsort(lengths, descending=True, stable=True)
    lengths = lengths[order]
    return order, lengths, cu_seqlens[:-1].long()[order], lengths.tolist()


def _packed_ssd(
    v: Tensor, a: Tensor, B: Tensor, C: Tensor, h: Tensor, cu_seqlens: Tensor, memo: dict | None
) -> tuple[Tensor, Tensor]:
    """The chunks of all sequences that are at the same place in theirs, side by side; arguments have no batch."""
    order, lengths, first, sizes = kept_in(memo, "by_length", lambda: _by_length(cu_seqlens))
    last = first + lengths - 1
    h = h.index_select(0, order)
    outputs, tokens = [], []
    for start in range(0, max(sizes, default=0), SSD_CHUNK):
        states, row = [], 0
        while row < len(sizes) and (left := sizes[row] - start) > 0:
            # Together with those that are at least three quarters as long, which bounds the padding.
            width = min(left, SSD_CHUNK)
            stop = next((i for i in range(row, len(sizes)) if 4 * (sizes[i] - start) < 3 * width), len(sizes))
            time = torch.arange(start, start + width, device=v.device)
            at = first[row:stop, None] + time
            padded = sizes[stop - 1] - start < width
            if padded:  # with the sequence's own last token, where no step is made
                real = lengths[row:stop, None] > time
                at = torch.minimum(at, last[row:stop, None])
            v_, a_, B_, C_ = (_rows(x, at) for x in (v, a, B, C))
            if padded:
                v_, a_ = v_ * real[..., None, None], a_ * real[..., None]
            y, state = _ssd_chunk(v_, a_, B_, C_, h[row:stop])
            y, at = y.flatten(0, 1), at.flatten()
            if padded:
                kept = real.flatten().nonzero()[:, 0]
                y, at = y.index_select(0, kept), at.index_select(0, kept)
            outputs.append(y)
            tokens.append(at)
            states.append(state)
            row = stop
        h = torch.cat([*states, h[row:]])
    y = torch.cat(outputs).index_select(0, _inverse(torch.cat(tokens))) if outputs else v
    return y[None], h.index_select(0, _inverse(order))


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """x[at], rows of x, by index_select, which copies each as a whole."""
    return x.index_select(0, at.flatten()).view(*at.shape, *x.shape[1:])


def _inverse(permutation: Tensor) -> Tensor:
    positions = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, positions)


def _cumulative(a: Tensor) -> Tensor:
    """(..., T): sums of a over 0 .. t, in powers of two, for exp2, which on a CPU is faster than exp.

    In float64, wherever a device has it: the difference of two sums would cancel in float32 where both are large.
    """
    a = a if a.device.type == "mps" else a.double()
    return a.cumsum(-1) * math.log2(math.e)


def _between(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., T) to (..., T, T): exp2 of the sum over s+1 .. t, 0 where s > t."""
    future = torch.full((sums.shape[-1],) * 2, -torch.inf, dtype=dtype, device=sums.device).triu(1)
    return torch.sub(sums[..., :, None], sums[..., None, :]).to(dtype).add_(future).exp2_()
