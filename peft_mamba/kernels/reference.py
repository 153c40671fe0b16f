"""The operations of both mixers, written as their equations: one step of Python per token, for checking the others.

Shapes are channel-last. B batch, L tokens, D channels, N state size, K width of the convolution; Mamba-2 splits D into
H heads of P channels that share the B and C of their G groups. The state and all sums are kept in float32 (in float64
for float64 inputs); outputs come back in the dtype of the input.

Every function takes the same three optional descriptions of the rows of a batch:

    initial_state   what the row's earlier tokens left behind; zero where there were none
    lengths  (B,)   tokens at and after position lengths[b] are padding and leave the state as it is
    seq_idx  (B, L) int, constant within a document and changing at the first token of the next: no state crosses

or, in place of the last two, a row of sequences laid end to end, each with states of its own:

    cu_seqlens  (S+1,) int32 on the tensors' device, from 0 to L: B is 1, and sequence s is the tokens cu_seqlens[s] to
                cu_seqlens[s+1], none where the two are equal. Initial and final states have S in place of B.

The two scans also go on from states in a pool, without a copy of each where kernels can do that:

    initial_index  (S,) or (B,) int64, the row of initial_state, which may have any number of them, that each sequence
                   or row of the batch starts from; several may start from the same. None: each from its own.

and, where no gradient is wanted, write to memory that is there:

    out  as y, contiguous: y, on return. None: new memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def first_of_document(seq_idx: Tensor | None) -> Tensor | None:
    """(B, L) bool: True where a token starts a new document inside its row. The row's first token never does."""
    if seq_idx is None:
        return None
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def zero_padding(dt: Tensor, lengths: Tensor | None) -> Tensor:
    """`dt` (B, L, ...) with zeros at and after `lengths`: exp(0·A) = 1 and 0·B·u = 0 leave a state exactly as it is."""
    if lengths is None:
        return dt
    padding = torch.arange(dt.shape[1], device=dt.device) >= lengths[:, None]
    return dt.masked_fill(padding[..., None], 0.0)


def check_packed(
    x: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> int:
    """How many sequences `cu_seqlens` tells of, after a look at what goes with it; none at its values, on the device.

    Args:
        initial_state: what has one entry a sequence, `initial_index` where states are read by that.

    Raises:
        ValueError: x has several rows, cu_seqlens is no vector, the initial state has not one entry a sequence, or
            lengths or seq_idx are given as well.
    """
    if lengths is not None or seq_idx is not None:
        raise ValueError("cu_seqlens says where sequences start and end; give no lengths and no seq_idx with it.")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; expected integers of shape (S+1,)."
        )
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens divides one row into sequences; this batch has {len(x)} rows.")
    sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None and initial_state.shape[0] != sequences:
        raise ValueError(f"initial_state has {len(initial_state)} entries for the {sequences} sequences of cu_seqlens.")
    return sequences


def gathered(initial_state: Tensor | None, initial_index: Tensor | None) -> Tensor | None:
    """The state that each sequence starts from, a copy where there is an index; its gradient comes back to the pool.

    Raises:
        ValueError: there is an index, but no state.
    """
    if initial_index is None:
        return initial_state
    if initial_state is None:
        raise ValueError("initial_index says where in initial_state each sequence's is; there is no initial_state.")
    return initial_state.index_select(0, initial_index)


def gathers(scan: Callable) -> Callable:
    """`scan`, which has no initial_index and no out, with both: it gets copies of the states, and y is copied."""

    @functools.wraps(scan)
    def wrapped(
        *args: Any,
        initial_state: Tensor | None = None,
        initial_index: Tensor | None = None,
        out: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        y, final = scan(*args, initial_state=gathered(initial_state, initial_index), **kwargs)
        return put(y, out), final

    return wrapped


def put(y: Tensor, out: Tensor | None) -> Tensor:
    """y, in `out` if there is one."""
    return y if out is None else out.copy_(y)


def kept_in(memo: dict | None, name: Hashable, find_out: Callable[[], Any]) -> Any:
    """What `find_out` returns, once for all calls with this memo."""
    if memo is None:
        return find_out()
    if name not in memo:
        memo[name] = find_out()
    return memo[name]


def sequences_of(cu_seqlens: Tensor) -> list[slice]:
    """The tokens of each sequence."""
    bounds = cu_seqlens.tolist()
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def step_size(delta: Tensor, delta_bias: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Mamba-1's Δ = softplus(delta + delta_bias), in the accumulator's dtype, zero on padding. (B, L, D)."""
    delta = delta.to(accumulator_dtype(delta))
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)
    return zero_padding(F.softplus(delta), lengths)


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
    """Mamba-1's scan: Algorithm 2 of "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2312.00752).

        Δ_t = softplus(delta_t + delta_bias)
        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t
        y_t = (C_t h_t + D u_t) · silu(z_t)

    Args:
        u, delta, z: (B, L, D); z may be None.
        A: (D, N), negative. B, C: (B, L, N). D, delta_bias: (D,).
        initial_state: (B, D, N), h before the first token.
        memo: a dict that the caller keeps for calls with the same cu_seqlens and initial_index, in which an
            implementation may leave what it has found out about them. At first empty, or with the same as numbers,
            `host.OnHost`, at `host.ON_HOST`; None: nothing is kept.

    Returns:
        y (B, L, D) in u's dtype, and h after the last token of each row, (B, D, N), if asked for, else None.

    Raises:
        ValueError: cu_seqlens does not go with the other arguments.
    """
    if cu_seqlens is not None:
        check_packed(u, cu_seqlens, initial_state, lengths, seq_idx)
        parts = [
            selective_scan(
                *(u[:, part], delta[:, part], A, B[:, part], C[:, part], D),
                z=None if z is None else z[:, part],
                delta_bias=delta_bias,
                initial_state=None if initial_state is None else initial_state[s : s + 1],
                return_final_state=True,
            )
            for s, part in enumerate(sequences_of(cu_seqlens))
        ]
        return _joined(parts, u, u.new_zeros(0, *A.shape, dtype=accumulator_dtype(u)), return_final_state)
    dtype = accumulator_dtype(u)
    dt = step_size(delta, delta_bias, lengths)
    starts = first_of_document(seq_idx)
    x, A, B, C = u.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
    h = x.new_zeros(len(x), *A.shape) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None, None], 0.0)
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else x
    return skip_and_gate(y, x, D, z).to(u.dtype), h if return_final_state else None


def _joined(
    parts: list[tuple[Tensor, Any]], like: Tensor, none: Tensor, return_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Outputs and states of the sequences of a row, put together; like `like` and `none` where there is no sequence."""
    y = torch.cat([y for y, _ in parts], dim=1) if parts else torch.zeros_like(like)
    return y, torch.cat([none, *(h for _, h in parts)]) if return_final_state else None


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D x) · silu(z), in y's dtype; each of D and z may be None."""
    if D is not None:
        y = y + x * D.to(y.dtype)
    return y if z is None else y * F.silu(z.to(y.dtype))


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
    """Mamba-2's scan, the recurrent form of state-space duality ("Transformers are SSMs", 2405.21060, section 6).

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ
        y_t = h_t C_t + D x_t

    Args:
        x: (B, L, H, P).
        dt: (B, L, H), the step sizes themselves: bias, softplus and limits are already in it.
        A, D: (H,), A negative. B, C: (B, L, G, N), G dividing H.
        initial_state: (B, H, P, N), h before the first token.
        memo: as for `selective_scan`.

    Returns:
        y (B, L, H, P) in x's dtype, and h after the last token of each row, (B, H, P, N), if asked for, else None.

    Raises:
        ValueError: cu_seqlens does not go with the other arguments.
    """
    if cu_seqlens is not None:
        check_packed(x, cu_seqlens, initial_state, lengths, seq_idx)
        parts = [
            ssd(
                *(x[:, part], dt[:, part], A, B[:, part], C[:, part], D),
                initial_state=None if initial_state is None else initial_state[s : s + 1],
                return_final_state=True,
            )
            for s, part in enumerate(sequences_of(cu_seqlens))
        ]
        none = x.new_zeros(0, *x.shape[2:], B.shape[-1], dtype=accumulator_dtype(x))
        return _joined(parts, x, none, return_final_state)
    dtype = accumulator_dtype(x)
    dt = zero_padding(dt.to(dtype), lengths)
    starts = first_of_document(seq_idx)
    u, A = x.to(dtype), A.to(dtype)
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (t.to(dtype).repeat_interleave(heads_per_group, dim=2) for t in (B, C))
    h = u.new_zeros(len(u), *u.shape[2:], B.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None, None, None], 0.0)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((h * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else u
    if D is not None:
        y = y + u * D.to(dtype)[:, None]
    return y.to(x.dtype), h if return_final_state else None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution over time that sees no later token: y_t = act(bias + Σ_k weight_k x_{t-K+1+k}).

    Args:
        x: (B, L, D). weight: (D, K). bias: (D,) or None.
        activation: "silu" or None.
        initial_state: (B, K-1, D), the inputs just before the first token, oldest first; zero if None.

    Returns:
        (B, L, D) in x's dtype.

    Raises:
        ValueError: activation is neither, or cu_seqlens does not go with the other arguments.
    """
    if cu_seqlens is not None:
        check_packed(x, cu_seqlens, initial_state, seq_idx=seq_idx)
        return _packed_conv1d(x, weight, bias, activation, initial_state, cu_seqlens)
    dtype, (_, length, _), width = accumulator_dtype(x), x.shape, weight.shape[1]
    before = x.new_zeros(len(x), width - 1, x.shape[2]) if initial_state is None else initial_state
    # (before, x) at offset k lines up tap k with each output position.
    inputs = torch.cat([before.to(dtype), x.to(dtype)], dim=1)
    weight = weight.to(dtype)
    y = inputs.new_zeros(()) if bias is None else bias.to(dtype)
    for k in range(width):
        tap = inputs[:, k : k + length]
        back = width - 1 - k
        if seq_idx is not None and back > 0:
            other = torch.zeros_like(seq_idx, dtype=torch.bool)
            other[:, back:] = seq_idx[:, back:] != seq_idx[:, :-back]
            # What lies before the row belongs to its first document only.
            other[:, :back] = seq_idx[:, :back] != seq_idx[:, :1]
            tap = tap.masked_fill(other[..., None], 0.0)
        y = y + tap * weight[:, k]
    return _activated(y, activation).to(x.dtype)


def _activated(y: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return y
    if activation != "silu":
        raise ValueError(f"activation is 'silu' or None, not {activation!r}")
    return F.silu(y)


def _packed_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
) -> Tensor:
    """`causal_conv1d` over a packed row in one pass: each tap of a token is a row of (the tokens, what came before)."""
    dtype, (_, length, channels), width = accumulator_dtype(x), x.shape, weight.shape[1]
    starts = cu_seqlens[:-1].long()
    sequence = torch.repeat_interleave(
        torch.arange(len(starts), device=x.device), cu_seqlens.diff().long(), output_size=length
    )
    token = torch.arange(length, device=x.device)
    before = x.new_zeros(1, channels) if initial_state is None else initial_state.flatten(0, 1)
    inputs = torch.cat([x[0].to(dtype), before.to(dtype)])
    weight = weight.to(dtype)
    y = inputs.new_zeros(()) if bias is None else bias.to(dtype)
    for k in range(width):
        back = width - 1 - k
        place = token - starts[sequence] - back  # of the tap in its sequence, negative before its first token
        outside = width - 1 + place + sequence * (width - 1) if initial_state is not None else 0
        tap = (
            inputs.index_select(0, torch.where(place >= 0, token - back, length + outside)) if back else inputs[:length]
        )
        y = torch.addcmul(y, tap, weight[:, k])
    return _activated(y, activation).to(x.dtype)[None]
