"""Depthwise causal convolution in Triton, channel-last, forward and backward; shapes and meanings as in `reference`.

Both passes are bound by memory. Forward takes a tile of tokens and channels and reads it once for each tap, of which
all but one come out of the cache. Backward walks a strip of channels through time with the last inputs and the
unfinished gradients in registers: it recomputes what went into the activation, and reads each value once. Sums over
tokens are made in a fixed order, so that the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .. import chunked
from ..reference import check_packed
from .common import Tensor, row_strides, search_steps, sequence_of

# Beyond this the registers of backward's window run out.
MAX_WIDTH = 8
FORWARD_TOKENS, FORWARD_CHANNELS, FORWARD_WARPS = 16, 128, 4
# A warp with four channels a thread. A program's strip starts with width - 1 tokens of which it only needs the sums.
BACKWARD_TOKENS, BACKWARD_CHANNELS, BACKWARD_WARPS = 128, 128, 1
# Differ from batch to batch: no kernel is compiled anew for a multiple of 16 or a 1 among them.
VARYING = ["length", "tiles", "sequences", "steps"]


@triton.jit(do_not_specialize=VARYING)
def _forward(
    x,
    weight,
    bias,
    initial,
    seq_idx,
    cu_seqlens,
    y,
    length,
    channels,
    tiles,
    sequences,
    steps,
    x_row,
    x_token,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * TOKENS
    i = tl.arange(0, TOKENS)
    t = first + i
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_row, in_width = t < length, d < channels
    if PACKED:
        sequence = sequence_of(t, cu_seqlens, sequences, steps).to(tl.int64)
        place = t - tl.load(cu_seqlens + sequence)
    else:
        sequence = row + i * 0
        place = t
    if HAS_SEQ_IDX:
        document = tl.load(seq_idx + row * length + t, mask=in_row)
    x += row * x_row + first.to(tl.int64) * x_token
    sums = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + d, mask=in_width, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(WIDTH):
        w = tl.load(weight + d * WIDTH + WIDTH - 1 - back, mask=in_width, other=0.0).to(tl.float32)
        here = in_row & (place >= back)
        if HAS_SEQ_IDX:
            here = here & (tl.load(seq_idx + row * length + t - back, mask=here) == document)
        tap = tl.load(x + (i - back)[:, None] * x_token + d[None, :], mask=here[:, None] & in_width[None, :], other=0.0)
        sums += tap.to(tl.float32) * w[None, :]
    if HAS_INITIAL and WIDTH > 1:
        if PACKED or first < WIDTH - 1:
            for back in tl.static_range(1, WIDTH):
                w = tl.load(weight + d * WIDTH + WIDTH - 1 - back, mask=in_width, other=0.0).to(tl.float32)
                before = in_row & (place < back)
                if HAS_SEQ_IDX:  # what lies before a row belongs to its first document
                    before = before & (tl.load(seq_idx + row * length) == document)
                at = (sequence * (WIDTH - 1) + place + WIDTH - 1 - back) * channels
                tap = tl.load(initial + at[:, None] + d[None, :], mask=before[:, None] & in_width[None, :], other=0.0)
                sums += tap.to(tl.float32) * w[None, :]
    if SILU:
        sums *= tl.sigmoid(sums)
    y += (row * length + first) * channels
    tl.store(
        y + i[:, None] * channels + d[None, :],
        sums.to(y.dtype.element_ty),
        mask=in_row[:, None] & in_width[None, :],
    )


@triton.jit(do_not_specialize=VARYING)
def _backward(
    x,
    weight,
    bias,
    initial,
    seq_idx,
    cu_seqlens,
    dy,
    dx,
    dweight,
    dbias,
    length,
    channels,
    tiles,
    sequences,
    steps,
    x_row,
    x_token,
    dy_row,
    dy_token,
    dx_row,
    dx_token,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    PACKED: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * TOKENS
    stop = tl.minimum(first + TOKENS, length)
    # The gradient of an input is complete with the output WIDTH - 1 tokens later.
    last = tl.minimum(stop + WIDTH - 1, length) if NEED_X else stop
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_width = d < channels
    sequence, start = row, 0
    if PACKED:
        sequence = sequence_of(first, cu_seqlens, sequences, steps).to(tl.int64)
        start = tl.load(cu_seqlens + sequence)
    x += row * x_row + d
    dy += row * dy_row + d
    dx += row * dx_row + d
    nothing = tl.zeros([CHANNELS], tl.float32)
    offset = nothing
    if HAS_BIAS:
        offset += tl.load(bias + d, mask=in_width, other=0.0).to(tl.float32)
    # By how far back in time a tap lies: weights, inputs, and the sums of what these inputs get and these weights get.
    w, inputs, sums, totals, total = (), (), (), (), nothing
    for back in tl.static_range(WIDTH):
        w = w + (tl.load(weight + d * WIDTH + WIDTH - 1 - back, mask=in_width, other=0.0).to(tl.float32),)
        inside = in_width & (first >= back)
        inputs = inputs + (tl.load(x + (first - back).to(tl.int64) * x_token, mask=inside, other=0.0).to(tl.float32),)
        sums = sums + (nothing,)
        totals = totals + (nothing,)
    g_next = tl.load(dy + first.to(tl.int64) * dy_token, mask=in_width, other=0.0)
    for step in range(last - first):
        t = first + step
        g = g_next.to(tl.float32)
        # One token ahead, so that it is on its way while this one is worked on.
        ahead = in_width & (t + 1 < last)
        after = (t + 1).to(tl.int64)
        x_next = tl.load(x + after * x_token, mask=ahead, other=0.0)
        g_next = tl.load(dy + after * dy_token, mask=ahead, other=0.0)
        if PACKED:
            while tl.load(cu_seqlens + sequence + 1) <= t:
                sequence += 1
            start = tl.load(cu_seqlens + sequence)
        place = t - start
        if HAS_SEQ_IDX:
            document = tl.load(seq_idx + row * length + t)
        s = offset
        taps, mine = (), ()
        for back in tl.static_range(WIDTH):
            here = place >= back
            if HAS_SEQ_IDX:
                here = here & (tl.load(seq_idx + row * length + t - back, mask=here, other=0) == document)
            tap = tl.where(here, inputs[back], 0.0)
            if HAS_INITIAL and back > 0:
                before = place < back
                if HAS_SEQ_IDX:
                    before = before & (tl.load(seq_idx + row * length) == document)
                at = (sequence * (WIDTH - 1) + place + WIDTH - 1 - back) * channels
                tap += tl.load(initial + at + d, mask=in_width & before, other=0.0).to(tl.float32)
            s += tap * w[back]
            taps = taps + (tap,)
            mine = mine + (here,)
        if SILU:
            sigmoid = tl.sigmoid(s)
            g = g * sigmoid * (1.0 + s * (1.0 - sigmoid))
        if NEED_X:
            added = ()
            for back in tl.static_range(WIDTH):
                added = added + (sums[back] + tl.where(mine[back], g * w[back], 0.0),)
            done = t - (WIDTH - 1)
            tl.store(
                dx + done.to(tl.int64) * dx_token,
                added[WIDTH - 1].to(dx.dtype.element_ty),
                mask=in_width & (done >= first),
            )
            sums = (nothing,)
            for back in tl.static_range(WIDTH - 1):
                sums = sums + (added[back],)
        if NEED_WEIGHT:
            own = tl.where(t < stop, g, 0.0)
            total += own
            grown = ()
            for back in tl.static_range(WIDTH):
                grown = grown + (totals[back] + own * taps[back],)
            totals = grown
        moved = (x_next.to(tl.float32),)
        for back in tl.static_range(WIDTH - 1):
            moved = moved + (inputs[back],)
        inputs = moved
    if NEED_X:
        for back in tl.static_range(1, WIDTH):  # at the end of a row no output follows
            t = last - back
            tl.store(
                dx + t.to(tl.int64) * dx_token,
                sums[back].to(dx.dtype.element_ty),
                mask=in_width & (t >= first) & (t < stop),
            )
    if NEED_WEIGHT:
        program = tl.program_id(0).to(tl.int64)
        tl.store(dbias + program * channels + d, total, mask=in_width)
        for back in tl.static_range(WIDTH):
            at = (program * channels + d) * WIDTH + WIDTH - 1 - back
            tl.store(dweight + at, totals[back], mask=in_width)


@triton.jit(do_not_specialize=["length"])
def _backward_initial(
    x,
    weight,
    bias,
    initial,
    seq_idx,
    cu_seqlens,
    dy,
    dinitial,
    length,
    channels,
    x_row,
    x_token,
    dy_row,
    dy_token,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    PACKED: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """What the inputs before a sequence get from its first WIDTH - 1 outputs."""
    sequence = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_width = d < channels
    if PACKED:
        first = tl.load(cu_seqlens + sequence)
        tokens = tl.load(cu_seqlens + sequence + 1) - first
        row = sequence * 0
    else:
        first, tokens, row = 0, length, sequence
    x += row * x_row + first.to(tl.int64) * x_token + d if PACKED else row * x_row + d
    dy += row * dy_row + first.to(tl.int64) * dy_token + d if PACKED else row * dy_row + d
    initial += sequence * (WIDTH - 1) * channels + d
    sums = ()
    for _ in tl.static_range(WIDTH - 1):
        sums = sums + (tl.zeros([CHANNELS], tl.float32),)
    for t in tl.static_range(WIDTH - 1):
        mine = t < tokens
        if HAS_SEQ_IDX:
            document = tl.load(seq_idx + row * length + t, mask=mine, other=0)
            mine = mine & (document == tl.load(seq_idx + row * length, mask=mine, other=0))
        s = tl.zeros([CHANNELS], tl.float32)
        if HAS_BIAS:
            s += tl.load(bias + d, mask=in_width, other=0.0).to(tl.float32)
        for k in tl.static_range(WIDTH):
            w = tl.load(weight + d * WIDTH + k, mask=in_width, other=0.0).to(tl.float32)
            if t + k < WIDTH - 1:
                tap = tl.load(initial + (t + k) * channels, mask=in_width, other=0.0)
            else:
                tap = tl.load(x + (t + k - WIDTH + 1) * x_token, mask=in_width & mine, other=0.0)
            s += tap.to(tl.float32) * w
        g = tl.load(dy + t * dy_token, mask=in_width & mine, other=0.0).to(tl.float32)
        if SILU:
            sigmoid = tl.sigmoid(s)
            g = g * sigmoid * (1.0 + s * (1.0 - sigmoid))
        grown = ()
        for r in tl.static_range(WIDTH - 1):
            if r >= t:
                w = tl.load(weight + d * WIDTH + r - t, mask=in_width, other=0.0).to(tl.float32)
                grown = grown + (sums[r] + g * w,)
            else:
                grown = grown + (sums[r],)
        sums = grown
    for r in tl.static_range(WIDTH - 1):
        at = (sequence * (WIDTH - 1) + r) * channels + d
        tl.store(dinitial + at, sums[r].to(dinitial.dtype.element_ty), mask=in_width)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, seq_idx, cu_seqlens, silu):
        batch, length, channels = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ctx.silu = silu
        ctx.save_for_backward(x, weight, bias, initial_state, seq_idx, cu_seqlens)
        # A tile for no more tokens than there are: a single one when text is generated.
        tokens = min(FORWARD_TOKENS, triton.next_power_of_2(length))
        tiles = triton.cdiv(length, tokens)
        with torch.cuda.device_of(x):
            _forward[(batch * tiles, triton.cdiv(channels, FORWARD_CHANNELS))](
                *(x, weight, bias, initial_state, seq_idx, cu_seqlens, y),
                *(length, channels, tiles, 0 if cu_seqlens is None else len(cu_seqlens) - 1, search_steps(cu_seqlens)),
                *(x.stride(0), x.stride(1)),
                **_switches(weight, bias, silu, seq_idx, cu_seqlens),
                HAS_INITIAL=initial_state is not None,
                TOKENS=tokens,
                CHANNELS=FORWARD_CHANNELS,
                num_warps=FORWARD_WARPS,
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]  # mypy sees the decorator, not the method
        x, weight, bias, initial_state, seq_idx, cu_seqlens = ctx.saved_tensors
        need_x, need_weight, need_bias, need_initial = ctx.needs_input_grad[:4]
        need_weight = need_weight or need_bias
        dy = row_strides(dy)
        batch, length, channels = x.shape
        tiles = triton.cdiv(length, BACKWARD_TOKENS)
        switches = _switches(weight, bias, ctx.silu, seq_idx, cu_seqlens)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
        dweight = dbias = dinitial = None
        with torch.cuda.device_of(x):
            if need_x or need_weight:
                if need_weight:  # a sum for each program, added up below
                    dweight = weight.new_empty(batch * tiles, *weight.shape, dtype=torch.float32)
                    dbias = weight.new_empty(batch * tiles, channels, dtype=torch.float32)
                into = x if dx is None else dx
                _backward[(batch * tiles, triton.cdiv(channels, BACKWARD_CHANNELS))](
                    *(x, weight, bias, initial_state, seq_idx, cu_seqlens, dy, into, dweight, dbias),
                    *(length, channels, tiles, 0 if cu_seqlens is None else len(cu_seqlens) - 1),
                    *(search_steps(cu_seqlens), x.stride(0), x.stride(1), dy.stride(0), dy.stride(1)),
                    *(into.stride(0), into.stride(1)),
                    **switches,
                    HAS_INITIAL=initial_state is not None,
                    NEED_X=need_x,
                    NEED_WEIGHT=need_weight,
                    TOKENS=BACKWARD_TOKENS,
                    CHANNELS=BACKWARD_CHANNELS,
                    num_warps=BACKWARD_WARPS,
                )
            if need_initial:
                dinitial = torch.empty_like(initial_state)
                _backward_initial[(len(initial_state), triton.cdiv(channels, BACKWARD_CHANNELS))](
                    *(x, weight, bias, initial_state, seq_idx, cu_seqlens, dy, dinitial, length, channels),
                    *(x.stride(0), x.stride(1), dy.stride(0), dy.stride(1)),
                    **switches,
                    CHANNELS=BACKWARD_CHANNELS,
                    num_warps=BACKWARD_WARPS,
                )
        if dweight is not None:
            dweight = dweight.sum(0).to(weight.dtype)
        return dx, dweight, dbias.sum(0).to(bias.dtype) if need_bias else None, dinitial, None, None, None


def _switches(weight, bias, silu, seq_idx, cu_seqlens) -> dict[str, int | bool]:
    return {
        "WIDTH": weight.shape[1],
        "SILU": silu,
        "HAS_BIAS": bias is not None,
        "HAS_SEQ_IDX": seq_idx is not None,
        "PACKED": cu_seqlens is not None,
    }


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
    """`reference.causal_conv1d`; float64, empty inputs and widths above MAX_WIDTH go to `chunked`.

    x may be a slice of something wider, as long as its last dimension is contiguous. First derivatives only.
    """
    if x.dtype == torch.float64 or x.numel() == 0 or weight.shape[1] > MAX_WIDTH:
        return chunked.causal_conv1d(
            *(x, weight, bias),
            activation=activation,
            initial_state=initial_state,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        )
    if activation not in ("silu", None):
        raise ValueError(f"activation is 'silu' or None, not {activation!r}")
    if cu_seqlens is not None:
        check_packed(x, cu_seqlens, initial_state, seq_idx=seq_idx)
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    if weight.shape[1] == 1:
        initial_state = None
    return _CausalConv1d.apply(
        row_strides(x),
        weight.contiguous(),
        bias,
        None if initial_state is None else initial_state.contiguous(),
        None if seq_idx is None else seq_idx.to(torch.int32).contiguous(),
        cu_seqlens,
        activation == "silu",
    )
