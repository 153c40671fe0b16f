"""One token from a state to the next, without gradients: what generation runs, a single pass over the state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import Tensor, cdiv, next_power_of_2, row_strides
from .elementwise import sigmoid, softplus_and_slope

# Values of a state that a program takes.
SCAN_VALUES, SSD_VALUES = 1024, 4096


def is_step(x: Tensor, cu_seqlens: Tensor | None, *others: Tensor | None) -> bool:
    """Whether an operation on x (B, L, ...) and these tensors is a single token a row that no gradient follows."""
    with_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others))
    return x.shape[1] == 1 and cu_seqlens is None and not with_gradient


@triton.jit
def _selective_step(
    u, delta, A, B, C, D, z, delta_bias, before, lengths, y, after,
    channels, state_size, u_row, delta_row, b_row, c_row, z_row,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, WITH_STATE: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, N)
    in_width, in_state = d < channels, n < state_size
    inside = in_width[:, None] & in_state[None, :]
    at = d[:, None] * state_size + n[None, :]
    value = tl.load(u + row * u_row + d, mask=in_width, other=0.0).to(tl.float32)
    raw = tl.load(delta + row * delta_row + d, mask=in_width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(delta_bias + d, mask=in_width, other=0.0).to(tl.float32)
    step, _ = softplus_and_slope(raw)
    if HAS_LENGTHS:
        step = tl.where(tl.load(lengths + row) > 0, step, 0.0)
    key = tl.load(B + row * b_row + n, mask=in_state, other=0.0).to(tl.float32)
    query = tl.load(C + row * c_row + n, mask=in_state, other=0.0).to(tl.float32)
    state = (step * value)[:, None] * key[None, :]
    if HAS_STATE:
        decay = tl.exp(step[:, None] * tl.load(A + at, mask=inside, other=0.0).to(tl.float32))
        state += decay * tl.load(before + row * channels * state_size + at, mask=inside, other=0.0).to(tl.float32)
    if WITH_STATE:
        tl.store(after + row * channels * state_size + at, state, mask=inside)
    out = tl.sum(state * query[None, :], 1)
    if HAS_D:
        out += value * tl.load(D + d, mask=in_width, other=0.0).to(tl.float32)
    if HAS_Z:
        gate = tl.load(z + row * z_row + d, mask=in_width, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + row * channels + d, out.to(y.dtype.element_ty), mask=in_width)


@triton.jit
def _ssd_step(
    x, dt, A, B, C, D, before, lengths, y, after,
    heads, group_heads, head_size, state_size, x_row, x_head, b_row, b_group, c_row, c_group,
    HAS_D: tl.constexpr, HAS_STATE: tl.constexpr, HAS_LENGTHS: tl.constexpr, WITH_STATE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    group = head // group_heads
    p = tl.program_id(1) * P + tl.arange(0, P)
    n = tl.arange(0, N)
    in_head, in_state = p < head_size, n < state_size
    inside = in_head[:, None] & in_state[None, :]
    at = (row * heads + head) * head_size * state_size + p[:, None] * state_size + n[None, :]
    step = tl.load(dt + row * heads + head)
    if HAS_LENGTHS:
        step = tl.where(tl.load(lengths + row) > 0, step, 0.0)
    value = tl.load(x + row * x_row + head * x_head + p, mask=in_head, other=0.0).to(tl.float32)
    key = tl.load(B + row * b_row + group * b_group + n, mask=in_state, other=0.0).to(tl.float32)
    query = tl.load(C + row * c_row + group * c_group + n, mask=in_state, other=0.0).to(tl.float32)
    state = (step * value)[:, None] * key[None, :]
    if HAS_STATE:
        state += tl.exp(step * tl.load(A + head)) * tl.load(before + at, mask=inside, other=0.0).to(tl.float32)
    if WITH_STATE:
        tl.store(after + at, state, mask=inside)
    out = tl.sum(state * query[None, :], 1)
    if HAS_D:
        out += value * tl.load(D + head)
    tl.store(y + (row * heads + head) * head_size + p, out.to(y.dtype.element_ty), mask=in_head)


def selective_step(
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
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`reference.selective_scan` of one token a row, u (B, 1, D). No gradients; the new state is another tensor."""
    (batch, _, channels), state_size = u.shape, A.shape[1]
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    after = None
    if return_final_state:
        after = torch.empty(batch, channels, state_size, dtype=torch.float32, device=u.device)
    u, delta, B, C = (row_strides(t) for t in (u, delta, B, C))
    z = None if z is None else row_strides(z)
    n = next_power_of_2(state_size)
    size = max(1, min(next_power_of_2(channels), SCAN_VALUES // n))
    with torch.cuda.device_of(u):
        _selective_step[(batch, cdiv(channels, size))](
            *(u, delta, A.contiguous(), B, C, D, z, delta_bias),
            *(None if initial_state is None else initial_state.contiguous(), lengths, y, after, channels, state_size),
            *(t.stride(0) if t is not None else 0 for t in (u, delta, B, C, z)),
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=delta_bias is not None,
            HAS_STATE=initial_state is not None,
            HAS_LENGTHS=lengths is not None,
            WITH_STATE=return_final_state,
            CHANNELS=size,
            N=n,
            num_warps=4,
        )
    return y, after


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`reference.ssd` of one token a row, x (B, 1, H, P). No gradients; the new state is another tensor."""
    (batch, _, heads, head_size), (groups, state_size) = x.shape, B.shape[2:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    after = None
    if return_final_state:
        after = torch.empty(batch, heads, head_size, state_size, dtype=torch.float32, device=x.device)
    x, B, C = (row_strides(t) for t in (x, B, C))
    n = next_power_of_2(state_size)
    size = max(1, min(next_power_of_2(head_size), SSD_VALUES // n))
    with torch.cuda.device_of(x):
        _ssd_step[(batch * heads, cdiv(head_size, size))](
            *(x, dt.float().contiguous(), A.float().contiguous(), B, C, None if D is None else D.float()),
            *(None if initial_state is None else initial_state.contiguous(), lengths, y, after),
            *(heads, heads // groups, head_size, state_size),
            *(stride for t in (x, B, C) for stride in (t.stride(0), t.stride(2))),
            HAS_D=D is not None,
            HAS_STATE=initial_state is not None,
            HAS_LENGTHS=lengths is not None,
            WITH_STATE=return_final_state,
            P=size,
            N=n,
            num_warps=4,
        )
    return y, after
