"""The same operations in PyTorch alone, fast enough to train with: chunks of time, never (B, L, D, N) at once.

Within a chunk everything but the recurrence itself is one tensor operation, and the recurrence is one fused
multiply-add a step, in place. Backward keeps one state a chunk and recomputes the rest. Runs on any device and needs
nothing but PyTorch; shapes and meanings are those of `reference`.

Sequences of different lengths in a packed row run side by side, the longest first, without padding: `selective_scan`
takes at each step the tokens of those that are as long, `ssd` takes pieces of about the same length together.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .reference import (
    Tensor,
    accumulator_dtype,
    causal_conv1d,
    check_packed,
    first_of_document,
    skip_and_gate,
    step_size,
    zero_padding,
)

__all__ = ["causal_conv1d", "selective_scan", "ssd"]

# Values of one (chunk, B, N, D) buffer: 4 MiB of float32, about what the cores' own caches hold.
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
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`reference.selective_scan`, chunk by chunk. First derivatives only."""
    dtype = accumulator_dtype(u)
    dt = step_size(delta, delta_bias, lengths)
    x, A, B, C = u.to(dtype), A.to(dtype).T.contiguous(), B.to(dtype), C.to(dtype)
    batch, length, channels = x.shape
    if cu_seqlens is not None:
        batch = check_packed(u, cu_seqlens, initial_state, lengths, seq_idx)
    if initial_state is None:
        h = x.new_zeros(batch, *A.shape)
    else:
        h = initial_state.to(dtype).transpose(1, 2).contiguous()
    if cu_seqlens is not None:
        side = _SideBySide.of(cu_seqlens)
        y, h = _Scan.apply(
            *(side.sort(dt[0]), side.sort(x[0]), A, side.sort(B[0]), side.sort(C[0])), h[side.order], None, side.rows
        )
        y, h = y[side.place][None], h[side.rank]
    else:
        starts = first_of_document(seq_idx)
        y, h = _Scan.apply(
            *(_time_major(dt), _time_major(x), A, _time_major(B), _time_major(C), h),
            None if starts is None else _time_major(starts),
            [batch] * length,
        )
        y = y.view(length, batch, channels).transpose(0, 1)
    return skip_and_gate(y, x, D, z).to(u.dtype), h.transpose(1, 2) if return_final_state else None


def _time_major(x: Tensor) -> Tensor:
    """(B, L, ...) to (L · B, ...)."""
    return x.transpose(0, 1).flatten(0, 1)


class _SideBySide(NamedTuple):
    """The tokens of a packed row by their places in their sequences, of each place those of the longest sequence first.

    Of any place the sequences that are as long are then the first few.
    """

    order: Tensor  # (S,) the sequences, longest first
    rank: Tensor  # (S,) the inverse
    place: Tensor  # (L,) where each token of the row went
    token: Tensor  # (L,) the inverse
    rows: list[int]  # sequences that have a token at each place

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> _SideBySide:
        device = cu_seqlens.device
        lengths = cu_seqlens.diff().long()
        order = torch.argsort(lengths, descending=True, stable=True)
        rank = _inverse(order)
        total, longest = (int(lengths.sum()), int(lengths.max())) if len(lengths) else (0, 0)
        # As many sequences have a token at place t as are longer than t.
        shorter = torch.bincount(lengths, minlength=longest + 1).cumsum(0)[:longest]
        rows = len(lengths) - shorter
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=total)
        time = torch.arange(total, device=device) - cu_seqlens[:-1].long()[sequence]
        place = (rows.cumsum(0) - rows)[time] + rank[sequence]
        return cls(order, rank, place, _inverse(place), rows.tolist())

    def sort(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.token)


def _inverse(permutation: Tensor) -> Tensor:
    return torch.empty_like(permutation).scatter_(
        0, permutation, torch.arange(len(permutation), device=permutation.device)
    )


class _Chunk(NamedTuple):
    """Some steps of a scan over time-major tokens: which tokens, and how many rows each step has."""

    tokens: slice
    rows: list[int]


def _chunks(rows: list[int], A: Tensor) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    start = 0
    while rows:
        tokens = rows[0]
        steps = 1
        while steps < min(64, len(rows)) and (tokens + rows[steps]) * A.numel() <= SCAN_BUFFER:
            tokens += rows[steps]
            steps += 1
        chunks.append(_Chunk(slice(start, start + tokens), rows[:steps]))
        rows, start = rows[steps:], start + tokens
    return chunks


def _buffers(x: Tensor, A: Tensor, chunks: list[_Chunk]) -> tuple[Tensor, Tensor]:
    """Memory for `_states` of the longest chunk, taken once: fresh pages for each chunk cost as much as its sums."""
    longest = max((sum(chunk.rows) for chunk in chunks), default=0)
    return x.new_empty(longest, *A.shape), x.new_empty(longest, *A.shape)


def _states(
    dt: Tensor, x: Tensor, A: Tensor, B: Tensor, h: Tensor, starts: Tensor | None, rows: list[int], buffers: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Decays exp(Δ_t A) and states h_t of one chunk, of each of its steps (rows, N, D), in `buffers`; h is before."""
    decay, states = (buffer[: len(dt)] for buffer in buffers)
    torch.mul(dt[:, None, :], A, out=decay).exp_()
    if starts is not None:
        decay.masked_fill_(starts[:, None, None], 0.0)
    torch.mul((dt * x)[:, None, :], B[..., None], out=states)
    decays, steps = decay.split(rows), states.split(rows)
    for decay_t, h_t in zip(decays, steps, strict=True):
        h = h_t.addcmul_(decay_t, h[: len(h_t)])
    return decays, steps


class _Scan(torch.autograd.Function):
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, y_t = C_t h_t, with the gradient of every input and of both states.

    Tokens are time-major: step t has the next rows[t] of them, one for each of the first rows[t] states of h, and
    never more than the step before. dt, x: (ΣR, D). A: (N, D). B, C: (ΣR, N). h: (S, N, D). starts: (ΣR,) or None.
    Channels come last here, for what has N values alone is too short to be spread over.
    """

    @staticmethod
    def forward(ctx, dt, x, A, B, C, h, starts, rows):
        ctx.save_for_backward(dt, x, A, B, C, h, starts)
        y, final, before = torch.empty_like(x), h.clone(), []
        chunks = _chunks(rows, A)
        buffers = _buffers(x, A, chunks)
        for tokens, steps in chunks:
            before.append(h)
            starts_c = None if starts is None else starts[tokens]
            _, states = _states(dt[tokens], x[tokens], A, B[tokens], h, starts_c, steps, buffers)
            y[tokens] = (C[tokens][:, None, :] @ buffers[1][: tokens.stop - tokens.start]).squeeze(1)
            for h_t, going_on in zip(states, [*steps[1:], 0], strict=True):
                if going_on < len(h_t):  # here sequences end, or the chunk does
                    final[going_on : len(h_t)] = h_t[going_on:]
            h = states[-1].clone()
        # Attributes, not saved tensors: nothing outside can change them. The first is saved as an input.
        ctx.chunks, ctx.between = chunks, before[1:] if any(ctx.needs_input_grad) else None
        return y, final

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, dy, dh):  # type: ignore[override]  # mypy sees the decorator, not the method
        dt, x, A, B, C, h0, starts = ctx.saved_tensors
        d_dt, dx, dB, dC = torch.empty_like(dt), torch.empty_like(x), torch.empty_like(B), torch.empty_like(C)
        dA, dh = torch.zeros_like(A), dh.clone()
        buffers = _buffers(x, A, ctx.chunks)
        before = [h0, *ctx.between][: len(ctx.chunks)]
        for (tokens, rows), h in zip(reversed(ctx.chunks), reversed(before), strict=True):
            dt_c, x_c, B_c, C_c, dy_c = (t[tokens] for t in (dt, x, B, C, dy))
            starts_c = None if starts is None else starts[tokens]
            decays, steps = _states(dt_c, x_c, A, B_c, h, starts_c, rows, buffers)
            decay, states = (buffer[: len(dt_c)] for buffer in buffers)
            dC[tokens] = (states @ dy_c[..., None]).squeeze(-1)
            # G_t = dL/dh_t = C_t dy_t + exp(Δ_{t+1} A) G_{t+1}; where a sequence ends, dL/d(its final state) for the
            # last term, and dh holds that term for what follows this chunk.
            G = dy_c[:, None, :] * C_c[..., None]
            steps_G = G.split(rows)
            for t in range(len(rows) - 1, -1, -1):
                after = rows[t + 1] if t + 1 < len(rows) else 0
                if after:
                    steps_G[t][:after].addcmul_(decays[t + 1], steps_G[t + 1])
                if after < rows[t]:
                    steps_G[t][after:] += dh[after : rows[t]]
            dh[: rows[0]] = decays[0] * G[: rows[0]]
            GB = (B_c[:, None, :] @ G).squeeze(1)
            dB[tokens] = (G @ (dt_c * x_c)[..., None]).squeeze(-1)
            dx[tokens] = dt_c * GB
            # dL/d(Δ_t A), reusing the buffers: decay_t · h_{t-1} · G_t
            d_exponent = decay.mul_(G)
            for t, part in enumerate(d_exponent.split(rows)):
                part *= (steps[t - 1] if t else h)[: len(part)]
            d_dt[tokens] = (d_exponent * A).sum(1) + x_c * GB
            if ctx.needs_input_grad[2]:
                dA += (d_exponent * dt_c[:, None, :]).sum(0)
        return d_dt, dx, dA, dB, dC, dh, None, None


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
        y, h = _packed_ssd(values[0], exponent[0], B[0], C[0], h, cu_seqlens)
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
        y = y + u * D.to(dtype)[:, None]
    return y.to(x.dtype), h if return_final_state else None


def _ssd_chunk(
    v: Tensor, a: Tensor, B: Tensor, C: Tensor, h: Tensor, here: Tensor | None = None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and final state of one chunk: v = dt·x (B, T, H, P), a = dt·A (B, T, H), B, C (B, T, G, N), h before it.

    here, before: the documents of its tokens (B, T) and of the token before it (B, 1).
    """
    a = a.transpose(1, 2)
    B, C = (t.repeat_interleave(v.shape[2] // t.shape[2], dim=2) for t in (B, C))
    decay = torch.exp(_segment_sums(a))  # (B, H, T, T): from just after token s to token t, zero above the diagonal
    into = torch.exp(a.cumsum(-1))  # (B, H, T): from before the chunk to token t
    if here is not None and before is not None:
        decay = decay * (here[:, None, :, None] == here[:, None, None, :])
        into = into * (here == before)[:, None]
    scores = torch.einsum("bthn,bshn->bhts", C, B) * decay
    y = torch.einsum("bhts,bshp->bthp", scores, v) + torch.einsum("bthn,bhpn,bht->bthp", C, h, into)
    return y, into[:, :, -1, None, None] * h + torch.einsum("bhs,bshn,bshp->bhpn", decay[:, :, -1], B, v)


def _packed_ssd(v: Tensor, a: Tensor, B: Tensor, C: Tensor, h: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The chunks of all sequences that are at the same place in theirs, side by side; arguments have no batch."""
    lengths = cu_seqlens.diff().long()
    order = torch.argsort(lengths, descending=True, stable=True)
    sizes: list[int] = lengths[order].tolist()
    first = cu_seqlens[:-1].long()[order]
    h = h[order]
    outputs, tokens = [], []
    for start in range(0, max(sizes, default=0), SSD_CHUNK):
        states, row = [], 0
        while row < len(sizes) and (left := sizes[row] - start) > 0:
            # Together with those that are at least three quarters as long, which bounds the padding.
            width = min(left, SSD_CHUNK)
            stop = next((i for i in range(row, len(sizes)) if 4 * (sizes[i] - start) < 3 * width), len(sizes))
            time = torch.arange(width, device=v.device)
            real = torch.lt(time, (lengths[order[row:stop]] - start)[:, None])
            # Padding repeats the sequence's own last token; no step is made there.
            at = torch.minimum(first[row:stop, None] + start + time, (first + lengths[order] - 1)[row:stop, None])
            y, state = _ssd_chunk(v[at] * real[..., None, None], a[at] * real[..., None], B[at], C[at], h[row:stop])
            outputs.append(y[real])
            tokens.append(at[real])
            states.append(state)
            row = stop
        h = torch.cat([*states, h[row:]])
    y = torch.cat(outputs)[_inverse(torch.cat(tokens))] if outputs else v
    return y[None], h[_inverse(order)]


def _segment_sums(a: Tensor) -> Tensor:
    """(..., T) to (..., T, T): the sum of a over s+1 .. t, -inf where s > t.

    Sums each segment by itself: a difference of two cumulative sums would cancel where both are large.
    """
    size = a.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=a.device).tril()
    strictly_lower = lower.tril(-1)
    sums = a[..., None].expand(*a.shape, size).masked_fill(~strictly_lower, 0.0).cumsum(-2)
    return sums.masked_fill(~lower, -torch.inf)
