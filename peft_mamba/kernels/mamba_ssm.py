"""The scans through the CUDA and Triton kernels of mamba-ssm, where that is installed.

What they cannot do goes to our own, call by call, so that a result never depends on which of them ran:

    selective_scan   a state that needs a gradient, seq_idx, cu_seqlens, float64: selective_scan_fn has none of these
    ssd              cu_seqlens; single tokens, which it pads to a chunk; float64; and float32 unless TF32 is allowed,
                     since its Triton kernels multiply float32 in TF32
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

from .choice import ours
from .reference import Tensor, gathers, zero_padding

SSD_CHUNK = 256
# Triton's own switch, read when a kernel is compiled: without it a float32 product carries an error of about 1e-3.
FLOAT32_EXACT = os.environ.get("TRITON_F32_DEFAULT") == "ieee"
# Tokens at a time of what an initial state adds to the output: (B, T, D, N) float32.
CARRY_CHUNK = 16


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


@gathers
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
    """`reference.selective_scan`; u, delta, B, C and z are taken in u's dtype, the rest in float32."""
    stateful = initial_state is not None or return_final_state
    with_gradient = _needs_grad(u, delta, A, B, C, D, z, delta_bias, initial_state)
    apart = seq_idx is not None or cu_seqlens is not None
    if apart or u.dtype == torch.float64 or u.shape[1] == 0 or (stateful and with_gradient):
        return ours("selective_scan")(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            initial_state=initial_state,
            lengths=lengths,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
            memo=memo,
        )
    delta, B, C = (t.to(u.dtype) for t in (delta, B, C))
    z = None if z is None else z.to(u.dtype)
    A, D, delta_bias = A.float(), _float(D), _float(delta_bias)
    if lengths is not None:
        # softplus(-inf + bias) is 0 exactly: the step size that leaves the state as it is.
        padding = torch.arange(u.shape[1], device=u.device) >= lengths[:, None]
        delta = delta.masked_fill(padding[..., None], -torch.inf)
    if initial_state is not None and u.shape[1] == 1:
        state = initial_state.float().clone()
        gate = None if z is None else z[:, 0]
        y = selective_state_update(
            state, u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, gate, delta_bias, dt_softplus=True
        )
        return y[:, None], state if return_final_state else None
    u_, delta_, B_, C_ = (t.transpose(1, 2) for t in (u, delta, B, C))
    z_ = None if z is None else z.transpose(1, 2)
    result = selective_scan_fn(u_, delta_, A, B_, C_, D, z_, delta_bias, True, return_final_state)
    y, final_state = result if return_final_state else (result, None)
    y = y.transpose(1, 2)
    if initial_state is not None:
        carried, last = _carried(initial_state, delta, A, C, delta_bias)
        if z is not None:
            carried = carried * F.silu(z.float())
        y = (y.float() + carried).to(u.dtype)
        final_state = None if final_state is None else final_state + last
    return y, final_state


def _carried(h0: Tensor, delta: Tensor, A: Tensor, C: Tensor, delta_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What an initial state adds to a scan that started at zero: C_t exp(A Σ_{s≤t} Δ_s) h_0, and that decay at the end.

    The recurrence is linear in the state, so the two parts add exactly.
    """
    raw = delta.float() if delta_bias is None else delta.float() + delta_bias
    elapsed = F.softplus(raw).cumsum(1)
    h0 = h0.float()
    parts = [
        torch.einsum("btdn,btn->btd", torch.exp(seconds[..., None] * A) * h0[:, None], c.float())
        for seconds, c in zip(elapsed.split(CARRY_CHUNK, 1), C.split(CARRY_CHUNK, 1), strict=True)
    ]
    return torch.cat(parts, dim=1), torch.exp(elapsed[:, -1, :, None] * A) * h0


@gathers
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
    """`reference.ssd` through mamba-ssm's Triton kernels, gradients of both states included."""
    too_coarse = x.dtype == torch.float32 and not (FLOAT32_EXACT or torch.backends.cuda.matmul.allow_tf32)
    if too_coarse or cu_seqlens is not None or x.dtype == torch.float64 or x.shape[1] <= 1:
        return ours("ssd")(
            x,
            dt,
            A,
            B,
            C,
            D,
            initial_state=initial_state,
            lengths=lengths,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
            memo=memo,
        )
    result = mamba_chunk_scan_combined(
        x.contiguous(),
        zero_padding(dt.float(), lengths),
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        SSD_CHUNK,
        D=_float(D),
        initial_states=_float(initial_state),
        seq_idx=None if seq_idx is None else seq_idx.to(torch.int32).contiguous(),
        return_final_states=return_final_state,
    )
    return result if return_final_state else (result, None)
