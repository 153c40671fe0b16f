"""The kernels of the causal convolution; `causal_conv1d` calls them."""
# mypy: ignore-errors
# (Triton's language shares Python's syntax, not its types.)

from __future__ import annotations

import triton
import triton.language as tl

from .common import sequence_of

# Differ from batch to batch: no kernel is compiled anew for a multiple of 16 or a 1 among them.
VARYING = ["length", "tiles", "sequences", "steps"]


@triton.jit(do_not_specialize=VARYING)
def forward(
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
                earlier = tl.load(
                    initial + at[:, None] + d[None, :], mask=before[:, None] & in_width[None, :], other=0.0
                )
                sums += earlier.to(tl.float32) * w[None, :]
    if SILU:
        sums *= tl.sigmoid(sums)
    y += (row * length + first) * channels
    tl.store(
        y + i[:, None] * channels + d[None, :],
        sums.to(y.dtype.element_ty),
        mask=in_row[:, None] & in_width[None, :],
    )


@triton.jit(do_not_specialize=VARYING)
def backward(
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
def initial_gradients(
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
                here = mine
                if HAS_SEQ_IDX:
                    there = tl.load(seq_idx + row * length + t + k - WIDTH + 1, mask=mine, other=0)
                    here = here & (there == document)
                tap = tl.load(x + (t + k - WIDTH + 1) * x_token, mask=in_width & here, other=0.0)
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
