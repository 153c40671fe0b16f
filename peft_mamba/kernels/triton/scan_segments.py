"""What lets few long sequences fill a GPU: they are cut into segments of `split` tokens, which then run side by side.

`scan_ends` and `scan_ends_backward` find what each segment would leave behind from a zero state, in the direction of
time and, for gradients, against it; `scan_chain` joins those into what each starts from.
"""

import triton.language as tl

from .elementwise import LOG2E, sigmoid
from .scan_tiles import (
    RESET,
    advance,
    channels_of,
    kernel,
    load_states_inside,
    place,
    program_of,
    spread,
    step_size,
    tile_offsets,
)


@kernel
def scan_ends(
    u, delta, A, B, bias, resets, lengths, cu_seqlens, last, elapsed,
    stride_u, stride_delta, length, channels, blocks, offset, segments, split, waves, programs,
    N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    VARLEN: tl.constexpr, MASK_D: tl.constexpr,
):  # fmt: skip
    """The state that a segment leaves behind a zero state, and the decay of a state over it.

    `elapsed` (programs, 2, 32): the sum of the step sizes, and RESET if a document starts in the segment.
    """
    if place(waves) >= programs:
        return
    block, sequence, segment, first, tokens = program_of(
        cu_seqlens, length, blocks, offset, segments, split, waves, VARLEN
    )
    lane = tl.arange(0, 32)
    d, d_ok, tile, a, bias_d, limit = channels_of(
        A, bias, lengths, block, sequence, segment, split, channels, N, HAS_BIAS, HAS_LENGTHS, MASK_D
    )
    h = tl.zeros([N // 4, 4, 32], tl.float32)
    time = tl.zeros([32], tl.float32)
    boundary = tl.zeros([32], tl.float32)
    row = first + segment * split
    u += row * stride_u
    delta += row * stride_delta
    B += row * N
    resets += row
    for t in range(0, tokens, K):
        xs, raws, oks = (), (), ()
        for k in tl.static_range(K):
            inside = t + k < tokens
            xs = xs + (tl.load(u + k * stride_u + d, mask=d_ok & inside, other=0.0).to(tl.float32),)
            raws = raws + (tl.load(delta + k * stride_delta + d, mask=d_ok & inside, other=0.0).to(tl.float32),)
            oks = oks + (inside,)
        for k in tl.static_range(K):
            dd, slope = step_size(raws[k] + bias_d, t + k, limit, HAS_LENGTHS)
            dd = tl.where(oks[k], dd, 0.0)
            b = load_states_inside(B + k * N, oks[k], N)
            penalty = 0.0
            if HAS_RESETS:
                penalty = tl.where(tl.load(resets + k, mask=oks[k], other=0) != 0, RESET, 0.0)
            h = advance(h, dd, xs[k], b, a, penalty)
            time += dd
            boundary = tl.minimum(boundary, penalty)
        u += K * stride_u
        delta += K * stride_delta
        B += K * N
        resets += K
    program = (sequence * segments + segment) * blocks + block
    tl.store(last + program * (N * 32) + tile, h)
    tl.store(elapsed + program * 64 + lane, time)
    tl.store(elapsed + program * 64 + 32 + lane, boundary)


@kernel
def scan_ends_backward(
    delta, A, C, z, bias, resets, lengths, cu_seqlens, dy, dh0,
    stride_delta, stride_z, stride_dy, length, channels, blocks, offset, segments, split, waves, programs,
    N: tl.constexpr, K: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, VARLEN: tl.constexpr, MASK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment, from its own outputs alone."""
    if place(waves) >= programs:
        return
    block, sequence, segment, first, tokens = program_of(
        cu_seqlens, length, blocks, offset, segments, split, waves, VARLEN
    )
    d, d_ok, tile, a, bias_d, limit = channels_of(
        A, bias, lengths, block, sequence, segment, split, channels, N, HAS_BIAS, HAS_LENGTHS, MASK_D
    )
    dh = tl.zeros([N // 4, 4, 32], tl.float32)
    row = first + segment * split + tokens - K
    delta += row * stride_delta
    z += row * stride_z
    dy += row * stride_dy
    C += row * N
    resets += row
    for back in range(0, tokens, K):
        t = tokens - K - back
        raws, gs = (), ()
        for k in tl.static_range(K):
            inside = t + k >= 0
            raws = raws + (tl.load(delta + k * stride_delta + d, mask=d_ok & inside, other=0.0).to(tl.float32),)
            g = tl.load(dy + k * stride_dy + d, mask=d_ok & inside, other=0.0).to(tl.float32)
            if HAS_Z:
                gate = tl.load(z + k * stride_z + d, mask=d_ok & inside, other=0.0).to(tl.float32)
                g *= gate * sigmoid(gate)
            gs = gs + (g,)
        for j in tl.static_range(K):
            inside = t + K - 1 - j >= 0
            dd, slope = step_size(raws[K - 1 - j] + bias_d, t + K - 1 - j, limit, HAS_LENGTHS)
            dd = tl.where(inside, dd, 0.0)
            c = load_states_inside(C + (K - 1 - j) * N, inside, N)
            penalty = 0.0
            if HAS_RESETS:
                penalty = tl.where(tl.load(resets + K - 1 - j, mask=inside, other=0) != 0, RESET, 0.0)
            dh = (dh + spread(gs[K - 1 - j]) * c) * tl.exp2(spread(dd) * a + penalty)
        delta -= K * stride_delta
        z -= K * stride_z
        dy -= K * stride_dy
        C -= K * N
        resets -= K
    program = (sequence * segments + segment) * blocks + block
    tl.store(dh0 + program * (N * 32) + tile, dh)


@kernel
def scan_chain(A, elapsed, h0, last, blocks, segments, N: tl.constexpr, REVERSE: tl.constexpr, HAS_H0: tl.constexpr):
    """Join segments: overwrite what each leaves behind a zero state, in `last`, by what it starts from.

    `last` has a tile for each block of each segment of each sequence. REVERSE goes against time, for gradients. `h0`,
    a tile for each block of each sequence, is what the first segment (REVERSE: the last one) starts from.
    """
    lane = tl.arange(0, 32)
    tile = tile_offsets(N)
    block = tl.program_id(0) % blocks
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    a = tl.load(A + block * (N * 32) + tile) * LOG2E
    h = tl.zeros([N // 4, 4, 32], tl.float32)
    if HAS_H0:
        h += tl.load(h0 + (sequence * blocks + block) * (N * 32) + tile)
    for i in range(0, segments):
        segment = segments - 1 - i if REVERSE else i
        program = (sequence * segments + segment) * blocks + block
        time = tl.load(elapsed + program * 64 + lane)
        boundary = tl.load(elapsed + program * 64 + 32 + lane)
        own = tl.load(last + program * (N * 32) + tile)
        tl.store(last + program * (N * 32) + tile, h)
        h = tl.exp2(spread(time) * a + spread(boundary)) * h + own
