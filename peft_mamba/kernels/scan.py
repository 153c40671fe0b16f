"""Mamba-1's recurrence in PyTorch alone, forward and backward: a few steps at a time, never (B, L, D, N) at once.

What decides its speed on a CPU, measured:

- Channels are innermost, so that every operation runs along vectors, whatever N is; with N innermost, broadcasting Δ
  over it is a loop over 16 elements.
- The exponential is 2^(Δ·A·log₂e): PyTorch takes exp from MKL, which on an AMD processor took five times as long.
- A chunk and the state stay in the cores' caches, and each core keeps to the channels that it has there: buffers are
  (parts, places, N, D / parts), which PyTorch splits among its threads at the parts, in each operation alike.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from .schedule import Schedule

Tensor = torch.Tensor

# Values of one (parts, places, N, D / parts) buffer of a chunk: 4 MiB of float32.
SCAN_BUFFER = 2**20
# The fewest channels a part: shorter vectors cost more than an even split gains.
PART_CHANNELS = 64


class _Layout:
    """The tensors of one scan as the chunks see them: channels in parts, places in the order of the schedule."""

    def __init__(self, schedule: Schedule, A: Tensor):
        self.schedule = schedule
        channels, self.state_size = A.shape
        threads = torch.get_num_threads() if A.device.type == "cpu" else 1
        self.parts = max(
            n for n in range(1, threads + 1) if channels % n == 0 and channels // n >= min(PART_CHANNELS, channels)
        )
        self.width = channels // self.parts
        self.A = self.states_in(A[None])  # (parts, 1, N, width)
        self.exponent_factor = self.A * math.log2(math.e)
        state = max(1, channels * self.state_size)
        self.chunks = [
            (slice(start, start + sum(counts)), counts)
            for start, counts in schedule.chunks(max(1, SCAN_BUFFER // state))
        ]
        self._longest = max((places.stop - places.start for places, _ in self.chunks), default=0)
        self._memory: dict[int, Tensor] = {}

    def split(self, places: Tensor) -> Tensor:
        """(R, D) to (parts, R, width), a view."""
        return places.view(-1, self.parts, self.width).transpose(0, 1)

    def states_in(self, h: Tensor) -> Tensor:
        """(S, D, N) to (parts, S, N, width)."""
        return h.view(len(h), self.parts, self.width, self.state_size).permute(1, 0, 3, 2).contiguous()

    def states_out(self, h: Tensor) -> Tensor:
        """The inverse of `states_in`."""
        return h.permute(1, 0, 3, 2).reshape(-1, self.parts * self.width, self.state_size)

    def place(self, h: Tensor, sequences: Tensor | None) -> Tensor:
        """States (·, D, N) of these sequences, zero for all others, split into parts."""
        if sequences is not None:
            h = h.new_zeros(self.schedule.sequences, *h.shape[1:]).index_copy_(0, sequences, h)
        return self.states_in(h)

    def buffer(self, number: int, places: int) -> Tensor:
        """(parts, places, N, width), contiguous; taken once a scan, as fresh pages cost as much as a chunk's sums."""
        shape = (self.parts, places, self.state_size, self.width)
        if number not in self._memory:
            self._memory[number] = self.A.new_empty(self.A.numel() * self._longest)
        return self._memory[number][: math.prod(shape)].view(shape)

    def run(self, dt: Tensor, values: Tensor, B: Tensor, h: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Decays exp(Δ_t A) and states h_t at the places of one chunk, in buffers 0 and 1; `h` is before it.

        dt, values = Δ x: (parts, places, width). B: (places, N).
        """
        decay, states = (self.buffer(number, len(B)) for number in range(2))
        torch.mul(dt[:, :, None], self.exponent_factor, out=decay).exp2_()
        torch.mul(values[:, :, None], B[:, :, None], out=states)
        for count, state, factor in zip(counts, states.split(counts, 1), decay.split(counts, 1), strict=True):
            h = state.addcmul_(factor, h if h.shape[1] == count else h[:, :count])
        return decay, states


class Scan(torch.autograd.Function):
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, y_t = C_t h_t, with the gradient of every input and of both states.

    Shapes: dt, x (B, L, D), A (D, N), B, C (B, L, N), h (schedule.states, D, N), all of one dtype; the schedule is one
    for (B, L). Returns y (B, L, D) and the final states, of h's shape. Keeps one state a chunk for backward, which
    recomputes the rest; keeps nothing where no gradient is wanted. First derivatives only.
    """

    @staticmethod
    def forward(ctx, dt, x, A, B, C, h, schedule: Schedule):
        ctx.save_for_backward(dt, x, A, B, C, h)
        layout = _Layout(schedule, A)
        dt_r, x_r = (layout.split(schedule.gather(t)) for t in (dt, x))
        B_r, C_r = schedule.gather(B), schedule.gather(C)
        state = layout.place(h, schedule.first)
        final = state.clone()
        y, between = torch.empty_like(x).view(-1, x.shape[2]), []
        y_r = layout.split(y)
        for places, counts in layout.chunks:
            between.append(state)
            dt_c = dt_r[:, places]
            _, states = layout.run(dt_c, dt_c * x_r[:, places], B_r[places], state, counts)
            y_r[:, places] = (C_r[places, None] @ states).squeeze(-2)
            _keep_last(states, counts, final)
            state = final[:, : counts[-1]].clone()
        # An attribute, not saved tensors: nothing outside can change them.
        ctx.schedule, ctx.between = schedule, between if any(ctx.needs_input_grad) else None
        if schedule.last is not None:
            final = final[:, schedule.last]
        return schedule.scatter(y, *x.shape[:2]), layout.states_out(final)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):  # type: ignore[override]  # mypy sees the decorator, not the method
        with torch.autocast(dy.device.type, enabled=False):
            return *_gradients(ctx, dy, dh), None


def _keep_last(states: Tensor, counts: list[int], final: Tensor) -> None:
    """Put the states after a chunk, also of sequences that end inside it, into `final` (parts, S, N, width)."""
    end = states.shape[1]
    done = 0
    for count in reversed(counts):
        if count > done:
            final[:, done:count] = states[:, end - count + done : end]
            done = count
        end -= count


def _gradients(ctx, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
    dt, x, A, B, C, _ = ctx.saved_tensors
    schedule = ctx.schedule
    layout = _Layout(schedule, A)
    dt_r, x_r, dy_r = (layout.split(schedule.gather(t)) for t in (dt, x, dy))
    B_r, C_r = schedule.gather(B), schedule.gather(C)
    d_dt, dx, dB, dC = (torch.empty_like(t).view(-1, t.shape[2]) for t in (dt, x, B, C))
    d_dt_r, dx_r = layout.split(d_dt), layout.split(dx)
    dA = torch.zeros_like(layout.A)
    d_final = layout.place(dh, schedule.last)
    # dL/dh of the first so many sequences, from the steps after those at hand.
    later = d_final[:, :0]
    for (places, counts), before in zip(reversed(layout.chunks), reversed(ctx.between), strict=True):
        dt_c, x_c, dy_c, B_c, C_c = dt_r[:, places], x_r[:, places], dy_r[:, places], B_r[places], C_r[places]
        values = dt_c * x_c
        decay, states = layout.run(dt_c, values, B_c, before, counts)
        # As rows times matrices: the same products as matrices times columns take ten times as long in MKL.
        dC[places] = (dy_c[:, :, None] @ states.mT).squeeze(-2).sum(0)
        # G_t = dL/dh_t = C_t dy_t + exp(Δ_{t+1} A) G_{t+1}; dL/d(Δ_t A) = exp(Δ_t A) G_t h_{t-1} in place of the decay.
        G = torch.mul(dy_c[:, :, None], C_c[:, :, None], out=layout.buffer(2, len(B_c)))
        earlier = [before, *states.split(counts, 1)[:-1]]
        for count, G_t, factor, h in reversed(
            list(zip(counts, G.split(counts, 1), decay.split(counts, 1), earlier, strict=True))
        ):
            going_on = later.shape[1]
            G_t[:, :going_on] += later
            if going_on < count:
                G_t[:, going_on:] += d_final[:, going_on:count]
            later = G_t * factor
            torch.mul(later, h[:, :count], out=factor)
        GB = (B_c[:, None] @ G).squeeze(-2)
        dB[places] = (values[:, :, None] @ G.mT).squeeze(-2).sum(0)
        dx_r[:, places] = dt_c * GB
        d_dt_r[:, places] = torch.mul(decay, layout.A, out=G).sum(2) + x_c * GB
        if ctx.needs_input_grad[2]:
            dA += decay.mul_(dt_c[:, :, None]).sum(1, keepdim=True)
    rows = [schedule.scatter(t, *x.shape[:2]) for t in (d_dt, dx, dB, dC)]
    later = torch.cat([later, d_final[:, later.shape[1] :]], dim=1)  # sequences without tokens hand it on
    if schedule.first is not None:
        later = later[:, schedule.first]
    return rows[0], rows[1], layout.states_out(dA)[0], rows[2], rows[3], layout.states_out(later)
