"""The kernels of the causal convolution; `causal_conv1d` calls them.

A program walks a strip of channels through some tokens, GROUP of them at a time, while the next GROUP are on their
way from memory. Tuples run back in time: of a window, element 0 is one token ago; of weights, element 0 is the newest
input's.
"""
# mypy: ignore-errors
# (Triton's language shares Python's syntax, not its types.)

from __future__ import annotations

import triton
import triton.language as tl

from .common import sequence_of
from .elementwise import sigmoid

# Differ from batch to batch: no kernel is compiled anew for a multiple of 16 or a 1 among them.
VARYING = ["length", "strips", "tokens", "sequences", "steps"]


@triton.jit
def _slope(s):
    """The derivative of SiLU."""
    by = sigmoid(s)
    return by * (1.0 + s * (1.0 - by))


@triton.jit
def _row(x, token, d, PAIRED: tl.constexpr):
    """Pointers to channels of a token, or to PAIRED channels.

    Two numbers of half a register each are moved about one by one, and those on their way from memory are waited for.
    """
    if PAIRED:
        return (x + token).to(tl.pointer_type(tl.int32)) + d
    else:
        return x + token + d


@triton.jit
def _values(fetched, DTYPE: tl.constexpr, PAIRED: tl.constexpr):
    """In float32."""
    if not PAIRED:
        return fetched.to(tl.float32)
    elif DTYPE == tl.bfloat16:
        low, high = fetched << 16, fetched & -65536
        return tl.interleave(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    else:
        low, high = fetched.to(tl.int16), (fetched >> 16).to(tl.int16)
        values = tl.interleave(low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True))
        return values.to(tl.float32)


@triton.jit
def _strip(length, channels, strips, tokens, CHANNELS: tl.constexpr, PAIRED: tl.constexpr):
    """What this program is about: (row, first token, one behind the last, channels, and these in pairs if PAIRED).

    Programs of the same tokens are neighbours: together they read whole rows.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    block = tl.program_id(0) % blocks
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    if PAIRED:
        pairs = block * (CHANNELS // 2) + tl.arange(0, CHANNELS // 2)
    else:
        pairs = d
    strip = tl.program_id(0) // blocks
    first = strip % strips * tokens
    return (strip // strips).to(tl.int64), first, tl.minimum(first + tokens, length), d, pairs


@triton.jit
def _weights(weight, bias, d, in_width, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(weights, bias)"""
    w = ()
    for back in tl.static_range(WIDTH):
        w = w + (tl.load(weight + d * WIDTH + WIDTH - 1 - back, mask=in_width, other=0.0).to(tl.float32),)
    offset = tl.zeros(d.shape, tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + d, mask=in_width, other=0.0).to(tl.float32)
    return w, offset


@triton.jit
def _window(
    x, x_token, paired, initial, row, channels, d, in_width, first,
    DTYPE: tl.constexpr, PAIRED: tl.constexpr, WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """The WIDTH - 1 inputs before token `first`, at which x points."""
    window = ()
    for back in tl.static_range(1, WIDTH):
        value = _values(tl.load(x - back * x_token, mask=paired & (first >= back), other=0), DTYPE, PAIRED)
        if HAS_INITIAL:
            at = (row * (WIDTH - 1) + WIDTH - 1 + first - back) * channels
            value += tl.load(initial + at + d, mask=in_width & (first < back), other=0.0).to(tl.float32)
        window = window + (value,)
    return window


@triton.jit
def _token(x, x_token, ahead, left, inside):
    """The token `ahead` of the one that x points at; zeros from the `left`-th on."""
    return tl.load(x + ahead * x_token, mask=inside & (ahead < left), other=0)


@triton.jit
def _tokens(x, x_token, left, inside, GROUP: tl.constexpr):
    """The first GROUP of them."""
    fetched = ()
    for j in tl.static_range(GROUP):
        fetched = fetched + (_token(x, x_token, j, left, inside),)
    return fetched


@triton.jit
def _documents(seq_idx, first, length, WIDTH: tl.constexpr):
    """The documents of the WIDTH - 1 tokens before token `first` of the row of seq_idx."""
    documents = ()
    for back in tl.static_range(1, WIDTH):
        documents = documents + (tl.load(seq_idx + first - back, mask=first >= back, other=0),)
    return documents


@triton.jit
def _pushed(newest, window, LENGTH: tl.constexpr):
    """The window one token later."""
    moved = ()
    if LENGTH > 0:
        moved = moved + (newest,)
    for back in tl.static_range(LENGTH - 1):
        moved = moved + (window[back],)
    return moved


@triton.jit
def _start(cu_seqlens, sequence, start, stop, t, sequences):
    """(sequence, its first token, one behind its last) of token t of a packed row, from those of the token before."""
    while (stop <= t) & (sequence < sequences - 1):
        sequence += 1
        start = stop
        stop = tl.load(cu_seqlens + sequence + 1)
    return sequence, start, stop


@triton.jit
def _taps(
    value, window, initial, sequence, place, documents, document, opening, channels, d, in_width,
    WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What the taps of an output see, and which of it is an input of its own document.

    Only where a row is SPLIT into several: else `window` has zeros or the initial state before the row.
    """
    taps, mine = (value,), (True,)
    for back in tl.static_range(1, WIDTH):
        tap, here = window[back - 1], True
        if SPLIT:
            here = place >= back
            if HAS_SEQ_IDX:
                here = here & (documents[back - 1] == document)
            tap = tl.where(here, tap, 0.0)
            if HAS_INITIAL:
                before = place < back
                if HAS_SEQ_IDX:  # what lies before a row belongs to its first document
                    before = before & (opening == document)
                at = (sequence * (WIDTH - 1) + place + WIDTH - 1 - back) * channels
                tap += tl.load(initial + at + d, mask=in_width & before, other=0.0).to(tl.float32)
        taps = taps + (tap,)
        mine = mine + (here,)
    return taps, mine


@triton.jit(do_not_specialize=VARYING)
def forward(
    x, weight, bias, initial, seq_idx, cu_seqlens, y,
    length, channels, strips, tokens, sequences, steps, x_row, x_token,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr, PACKED: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = PACKED or HAS_SEQ_IDX
    row, first, stop, d, pairs = _strip(length, channels, strips, tokens, CHANNELS, PAIRED)
    in_width, paired = d < channels, pairs < (channels // 2 if PAIRED else channels)
    DTYPE: tl.constexpr = x.dtype.element_ty
    UNIT: tl.constexpr = 2 if PAIRED else 1
    w, offset = _weights(weight, bias, d, in_width, WIDTH, HAS_BIAS)
    x = _row(x, row * x_row + first.to(tl.int64) * x_token, pairs, PAIRED)
    x_token = x_token // UNIT
    y += (row * length + first) * channels + d
    window = _window(
        x, x_token, paired, initial, row, channels, d, in_width, first,
        DTYPE, PAIRED, WIDTH, HAS_INITIAL and not SPLIT,
    )  # fmt: skip
    xs = _tokens(x, x_token, stop - first, paired, GROUP)
    sequence, start, end = row, first * 0, length
    documents, document, opening = (), 0, 0
    if PACKED:
        sequence = sequence_of(first, cu_seqlens, sequences, steps).to(tl.int64)
        start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    if HAS_SEQ_IDX:
        seq_idx += row * length
        opening = tl.load(seq_idx)
        documents = _documents(seq_idx, first, length, WIDTH)
        numbers = _tokens(seq_idx + first, 1, stop - first, True, GROUP)
    for ahead in range(0, stop - first, GROUP):
        x_next, number_next = (), ()
        for j in tl.static_range(GROUP):
            t = first + ahead + j
            if PACKED:
                sequence, start, end = _start(cu_seqlens, sequence, start, end, t, sequences)
            # A token's register takes the token GROUP later as soon as it is free.
            value = _values(xs[j], DTYPE, PAIRED)
            x_next = x_next + (_token(x, x_token, ahead + GROUP + j, stop - first, paired),)
            if HAS_SEQ_IDX:
                document = numbers[j]
                number_next = number_next + (_token(seq_idx + first, 1, ahead + GROUP + j, stop - first, True),)
            taps, _ = _taps(
                value, window, initial, sequence, t - start, documents, document, opening, channels, d,
                in_width & (t < stop), WIDTH, HAS_INITIAL, HAS_SEQ_IDX, SPLIT,
            )  # fmt: skip
            s = offset
            for back in tl.static_range(WIDTH):
                s += taps[back] * w[back]
            if SILU:
                s *= sigmoid(s)
            tl.store(y + (ahead + j) * channels, s.to(y.dtype.element_ty), mask=in_width & (t < stop))
            window = _pushed(value, window, WIDTH - 1)
            if HAS_SEQ_IDX:
                documents = _pushed(document, documents, WIDTH - 1)
        xs = x_next
        if HAS_SEQ_IDX:
            numbers = number_next


@triton.jit(do_not_specialize=VARYING)
def backward(
    x, weight, bias, initial, seq_idx, cu_seqlens, dy, dx, dweight, dbias,
    length, channels, strips, tokens, sequences, steps, x_row, x_token, dy_row, dy_token, dx_row, dx_token,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr, PACKED: tl.constexpr, NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = PACKED or HAS_SEQ_IDX
    row, first, stop, d, pairs = _strip(length, channels, strips, tokens, CHANNELS, PAIRED)
    in_width, paired = d < channels, pairs < (channels // 2 if PAIRED else channels)
    DTYPE: tl.constexpr = x.dtype.element_ty
    UNIT: tl.constexpr = 2 if PAIRED else 1
    w, offset = _weights(weight, bias, d, in_width, WIDTH, HAS_BIAS)
    x = _row(x, row * x_row + first.to(tl.int64) * x_token, pairs, PAIRED)
    x_token = x_token // UNIT
    dy = _row(dy, row * dy_row + first.to(tl.int64) * dy_token, pairs, PAIRED)
    dy_token = dy_token // UNIT
    # The gradient of an input is complete with the output WIDTH - 1 tokens later; beyond a row outputs get none.
    walked = stop - first + (WIDTH - 1 if NEED_X else 0)
    left = tl.minimum(walked, length - first)
    dx += row * dx_row + (first.to(tl.int64) - (WIDTH - 1)) * dx_token + d
    window = _window(
        x, x_token, paired, initial, row, channels, d, in_width, first,
        DTYPE, PAIRED, WIDTH, HAS_INITIAL and not SPLIT,
    )  # fmt: skip
    xs = _tokens(x, x_token, left, paired, GROUP)
    dys = _tokens(dy, dy_token, left, paired, GROUP)
    sequence, start, end = row, first * 0, length
    documents, document, opening = (), 0, 0
    if PACKED:
        sequence = sequence_of(first, cu_seqlens, sequences, steps).to(tl.int64)
        start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    if HAS_SEQ_IDX:
        seq_idx += row * length
        opening = tl.load(seq_idx)
        documents = _documents(seq_idx, first, length, WIDTH)
        numbers = _tokens(seq_idx + first, 1, left, True, GROUP)
    # What the inputs in the window have got so far; what the weights and the bias have got.
    nothing = tl.zeros([CHANNELS], tl.float32)
    sums, totals, total = (), (), nothing
    for back in tl.static_range(WIDTH):
        if back > 0:
            sums = sums + (nothing,)
        totals = totals + (nothing,)
    for ahead in range(0, walked, GROUP):
        x_next, dy_next, number_next = (), (), ()
        for j in tl.static_range(GROUP):
            t = first + ahead + j
            if PACKED:
                sequence, start, end = _start(cu_seqlens, sequence, start, end, t, sequences)
            # A token's registers take the token GROUP later as soon as they are free.
            value, g = _values(xs[j], DTYPE, PAIRED), _values(dys[j], DTYPE, PAIRED)
            x_next = x_next + (_token(x, x_token, ahead + GROUP + j, left, paired),)
            dy_next = dy_next + (_token(dy, dy_token, ahead + GROUP + j, left, paired),)
            if HAS_SEQ_IDX:
                document = numbers[j]
                number_next = number_next + (_token(seq_idx + first, 1, ahead + GROUP + j, left, True),)
            taps, mine = _taps(
                value, window, initial, sequence, t - start, documents, document, opening, channels, d,
                in_width & (ahead + j < left), WIDTH, HAS_INITIAL, HAS_SEQ_IDX, SPLIT,
            )  # fmt: skip
            if SILU:
                s = offset
                for back in tl.static_range(WIDTH):
                    s += taps[back] * w[back]
                g *= _slope(s)
            if NEED_X:
                added = (g * w[0],)
                for back in tl.static_range(1, WIDTH):
                    if SPLIT:
                        added = added + (sums[back - 1] + tl.where(mine[back], g, 0.0) * w[back],)
                    else:
                        added = added + (sums[back - 1] + g * w[back],)
                done = ahead + j - (WIDTH - 1)
                tl.store(
                    dx + (ahead + j) * dx_token,
                    added[WIDTH - 1].to(dx.dtype.element_ty),
                    mask=in_width & (done >= 0) & (first + done < stop),
                )
                sums = ()
                for back in tl.static_range(WIDTH - 1):
                    sums = sums + (added[back],)
            if NEED_WEIGHT:
                own = tl.where(t < stop, g, 0.0)
                total += own
                grown = ()
                for back in tl.static_range(WIDTH):
                    grown = grown + (totals[back] + own * taps[back],)
                totals = grown
            window = _pushed(value, window, WIDTH - 1)
            if HAS_SEQ_IDX:
                documents = _pushed(document, documents, WIDTH - 1)
        xs, dys = x_next, dy_next
        if HAS_SEQ_IDX:
            numbers = number_next
    if NEED_WEIGHT:
        program = row * strips + first // tokens
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
            g *= _slope(s)
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
