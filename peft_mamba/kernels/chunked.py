"""The same operations in PyTorch alone, fast enough to train with: chunks of time, never (B, L, D, N) at once.

Within a chunk everything but the recurrence itself is one tensor operation, and the recurrence is one fused
multiply-add a step, in place. Backward keeps one state a chunk and recomputes the rest. Runs on any device and needs
nothing but PyTorch; shapes and meanings are those of `reference`.
"""

from __future__ import annotations

import functools

import torch
from torch.autograd.function import once_differentiable

from .reference import (
    Tensor,
    accumulator_dtype,
    causal_conv1d,
    first_of_document,
    skip_and_gate,
    step_size,
    zero_padding,
)

__all__ = ["causal_conv1d", "selective_scan", "ssd"]

# Values of one (chunk, B, D, N) buffer: 4 MiB of float32, about what the cores' own caches hold.
SCAN_BUFFER = 2**20
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
    starts = first_of_document(seq_idx)
    y, final_state = _Scan.apply(dt, x, A.to(dtype), B.to(dtype), C.to(dtype), h, starts)
    return skip_and_gate(y, x, D, z).to(u.dtype), final_state if return_final_state else None


def _chunks(x: Tensor, A: Tensor) -> list[slice]:
    length = x.shape[1]
    step = max(1, min(64, SCAN_BUFFER // max(1, len(x) * A.numel())))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _buffers(x: Tensor, A: Tensor, chunks: list[slice]) -> tuple[Tensor, Tensor]:
    """Memory for `_states` of the longest chunk, taken once: fresh pages for each chunk cost as much as its sums."""
    longest = chunks[0].stop if chunks else 0
    return x.new_empty(longest, len(x), *A.shape), x.new_empty(longest, len(x), *A.shape)


def _states(
    dt: Tensor, x: Tensor, A: Tensor, B: Tensor, h: Tensor, starts: Tensor | None, buffers: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Decays exp(Δ_t A) and states h_t of one time-major chunk, both (T, B, D, N), in `buffers`; `h` is before it."""
    decay, states = (buffer[: len(dt)] for buffer in buffers)
    torch.mul(dt[..., None], A, out=decay).exp_()
    if starts is not None:
        decay.masked_fill_(starts[..., None, None], 0.0)
    torch.mul((dt * x)[..., None], B[:, :, None, :], out=states)
    for t in range(len(states)):
        h = states[t].addcmul_(decay[t], h)
    return decay, states


class _Scan(torch.autograd.Function):
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, y_t = C_t h_t, with the gradient of every input and of both states."""

    @staticmethod
    def forward(ctx, dt, x, A, B, C, h, starts):
        ctx.save_for_backward(dt, x, A, B, C, h, starts)
        y, after = torch.empty_like(x), []
        chunks = _chunks(x, A)
        buffers = _buffers(x, A, chunks)
        for chunk in chunks:
            dt_c, x_c, B_c, C_c = (t[:, chunk].transpose(0, 1) for t in (dt, x, B, C))
            _, states = _states(dt_c, x_c, A, B_c, h, None if starts is None else starts[:, chunk].T, buffers)
            y[:, chunk] = (states @ C_c[..., None]).squeeze(-1).transpose(0, 1)
            h = states[-1].clone()
            after.append(h)
        # An attribute, not saved tensors: nothing outside can change them. The last is an output, not needed again.
        ctx.between = after[:-1] if any(ctx.needs_input_grad) else None
        return y, h if after else h.clone()

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, dy, dh):  # type: ignore[override]  # mypy sees the decorator, not the method
        dt, x, A, B, C, h0, starts = ctx.saved_tensors
        d_dt, dx, dB, dC = torch.empty_like(dt), torch.empty_like(x), torch.empty_like(B), torch.empty_like(C)
        dA = torch.zeros_like(A)
        chunks = _chunks(x, A)
        buffers = _buffers(x, A, chunks)
        for chunk, h in zip(reversed(chunks), reversed([h0, *ctx.between][: len(chunks)]), strict=True):
            dt_c, x_c, B_c, C_c, dy_c = (t[:, chunk].transpose(0, 1) for t in (dt, x, B, C, dy))
            decay, states = _states(dt_c, x_c, A, B_c, h, None if starts is None else starts[:, chunk].T, buffers)
            dC[:, chunk] = (dy_c[..., None, :] @ states).squeeze(-2).transpose(0, 1)
            # G_t = dL/dh_t = C_t dy_t + exp(Δ_{t+1} A) G_{t+1}
            G = dy_c[..., None] * C_c[:, :, None, :]
            G[-1] += dh
            for t in range(len(G) - 2, -1, -1):
                G[t].addcmul_(decay[t + 1], G[t + 1])
            dh = decay[0] * G[0]
            GB = (G @ B_c[..., None]).squeeze(-1)
            dB[:, chunk] = ((dt_c * x_c)[..., None, :] @ G).squeeze(-2).transpose(0, 1)
            dx[:, chunk] = (dt_c * GB).transpose(0, 1)
            # dL/d(Δ_t A), reusing the buffers: decay_t · h_{t-1} · G_t
            d_exponent = decay.mul_(G)
            d_exponent[0] *= h
            d_exponent[1:] *= states[:-1]
            d_dt[:, chunk] = ((d_exponent * A).sum(-1) + x_c * GB).transpose(0, 1)
            if ctx.needs_input_grad[2]:
                dA += (d_exponent * dt_c[..., None]).sum((0, 1))
        return d_dt, dx, dA, dB, dC, dh, None


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
