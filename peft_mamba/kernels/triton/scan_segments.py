"""What lets few long sequences fill a GPU: they are cut into segments of `split` tokens, which then run side by side.

`scan_ends` and `scan_ends_backward` find what each segment would leave behind from a zero state, in the direction of
time and, for gradients, against it; `scan_chain` joins those into what each starts from.
"""

import triton
import triton.language as tl

from .elementwise import LOG2E, sigmoid
from .scan_programs import RESET, channels_of, kernel, penalty, place, program_of, step_size
from .scan_ring import DELTA, U, Z, begin_copies, rows_of, states_of, take_group
from .scan_tiles import (
    advance,
    decay_rates,
    load_states_inside,
    no_state,
    spread,
    state_tiles,
    states_at,
    store_tiles,
)


@kernel
def scan_ends(
    u, delta, A, B, bias, resets, lengths, cu_seqlens, last, elapsed,
    stride_u, stride_delta, length, channels, blocks, offset, segments, split, waves, programs,
    STATES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, VARLEN: tl.constexpr, MASK_D: tl.constexpr, MASKED: tl.constexpr, RING: tl.constexpr,
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
    d, d_ok, bias_d, limit = channels_of(
        bias, lengths, block, sequence, segment, split, channels, HAS_BIAS, HAS_LENGTHS, MASK_D
    )
    tiles, inside = state_tiles(block, channels, STATES, N)
    a = decay_rates(A, tiles, inside, N, MASKED)
    h = no_state(N)
    time = tl.zeros([32], tl.float32)
    boundary = tl.zeros([32], tl.float32)
    row = first + segment * split
    u += row * stride_u
    delta += row * stride_delta
    B_t = B + row * N + states_at(N)
    resets += row
    whole = 0
    if RING:
        whole = tokens // K * K
        ring, turn, rows, distance, there, states = begin_copies(
            u, delta, u, u, stride_u, stride_delta, stride_u, stride_u, B + row * N, B + row * N, block, 0, whole > 0,
            K, RING, False, False,
        )  # fmt: skip
        for t in range(0, whole, K):
            group, turn, rows, states = take_group(
                ring, turn, rows, distance, there, states, t + K < whole, K, False, RING
            )
            xs, raws = rows_of(group, U, u, K, RING), rows_of(group, DELTA, delta, K, RING)
            bs, _ = states_of(group, K, RING)
            for k in tl.static_range(K):
                dd, slope = step_size(raws[k] + bias_d, t + k, limit, HAS_LENGTHS)
                start = penalty(resets, t + k, HAS_RESETS)
                h = advance(h, dd, xs[k], bs[k], a, start, N)
                time += dd
                boundary = tl.minimum(boundary, start)
        u += whole.to(tl.int64) * stride_u
        delta += whole.to(tl.int64) * stride_delta
        B_t += whole.to(tl.int64) * N
        resets += whole
    for t in range(whole, tokens, K):
        xs, raws, oks = (), (), ()
        for k in tl.static_range(K):
            real = t + k < tokens
            xs = xs + (tl.load(u + k * stride_u + d, mask=d_ok & real, other=0.0).to(tl.float32),)
            raws = raws + (tl.load(delta + k * stride_delta + d, mask=d_ok & real, other=0.0).to(tl.float32),)
            oks = oks + (real,)
        for k in tl.static_range(K):
            dd, slope = step_size(raws[k] + bias_d, t + k, limit, HAS_LENGTHS)
            dd = tl.where(oks[k], dd, 0.0)
            b = load_states_inside(B_t + k * N, oks[k], N)
            start = 0.0
            if HAS_RESETS:
                start = tl.where(tl.load(resets + k, mask=oks[k], other=0) != 0, RESET, 0.0)
            h = advance(h, dd, xs[k], b, a, start, N)
            time += dd
            boundary = tl.minimum(boundary, start)
        u += K * stride_u
        delta += K * stride_delta
        B_t += K * N
        resets += K
    slot = sequence * segments + segment
    program = slot * blocks + block
    store_tiles(last + slot * channels * STATES, tiles, inside, h, MASKED)
    tl.store(elapsed + program * 64 + lane, time)
    tl.store(elapsed + program * 64 + 32 + lane, boundary)


@kernel
def scan_ends_backward(
    delta, A, C, z, bias, resets, lengths, cu_seqlens, dy, dh0,
    stride_delta, stride_z, stride_dy, length, channels, blocks, offset, segments, split, waves, programs,
    STATES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESETS: tl.constexpr, HAS_LENGTHS: tl.constexpr, VARLEN: tl.constexpr, MASK_D: tl.constexpr,
    MASKED: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment, from its own outputs alone."""
    if place(waves) >= programs:
        return
    block, sequence, segment, first, tokens = program_of(
        cu_seqlens, length, blocks, offset, segments, split, waves, VARLEN
    )
    d, d_ok, bias_d, limit = channels_of(
        bias, lengths, block, sequence, segment, split, channels, HAS_BIAS, HAS_LENGTHS, MASK_D
    )
    tiles, inside = state_tiles(block, channels, STATES, N)
    a = decay_rates(A, tiles, inside, N, MASKED)
    dh = no_state(N)
    row = first + segment * split
    whole = 0
    if RING:
        # Groups are counted from the segment's end.
        whole = tokens // K * K
        ring, turn, rows, distance, there, states = begin_copies(
            dy, delta, dy, z, stride_dy, stride_delta, stride_dy, stride_z, C, C, block,
            row + tokens - K, whole > 0, K, RING, False, HAS_Z,
        )  # fmt: skip
        for back in range(0, whole, K):
            group, turn, rows, states = take_group(
                ring, turn, rows, distance, there, states, back + K < whole, K, True, RING
            )
            gs, raws = rows_of(group, U, dy, K, RING), rows_of(group, DELTA, delta, K, RING)
            gates = rows_of(group, Z, z, K, RING) if HAS_Z else gs
            cs, _ = states_of(group, K, RING)
            t = tokens - K - back
            for j in tl.static_range(K):
                g = gs[K - 1 - j]
                if HAS_Z:
                    g *= gates[K - 1 - j] * sigmoid(gates[K - 1 - j])
                dd, slope = step_size(raws[K - 1 - j] + bias_d, t + K - 1 - j, limit, HAS_LENGTHS)
                dh = _retreat(dh, dd, g, cs[K - 1 - j], a, penalty(resets + row, t + K - 1 - j, HAS_RESETS), N)
    row += tokens - whole - K
    delta += row * stride_delta
    z += row * stride_z
    dy += row * stride_dy
    C_t = C + row * N + states_at(N)
    resets += row
    for back in range(whole, tokens, K):
        t = tokens - K - back
        raws, gs = (), ()
        for k in tl.static_range(K):
            real = t + k >= 0
            raws = raws + (tl.load(delta + k * stride_delta + d, mask=d_ok & real, other=0.0).to(tl.float32),)
            g = tl.load(dy + k * stride_dy + d, mask=d_ok & real, other=0.0).to(tl.float32)
            if HAS_Z:
                gate = tl.load(z + k * stride_z + d, mask=d_ok & real, other=0.0).to(tl.float32)
                g *= gate * sigmoid(gate)
            gs = gs + (g,)
        for j in tl.static_range(K):
            real = t + K - 1 - j >= 0
            dd, slope = step_size(raws[K - 1 - j] + bias_d, t + K - 1 - j, limit, HAS_LENGTHS)
            dd = tl.where(real, dd, 0.0)
            c = load_states_inside(C_t + (K - 1 - j) * N, real, N)
            start = 0.0
            if HAS_RESETS:
                start = tl.where(tl.load(resets + K - 1 - j, mask=real, other=0) != 0, RESET, 0.0)
            dh = _retreat(dh, dd, gs[K - 1 - j], c, a, start, N)
        delta -= K * stride_delta
        z -= K * stride_z
        dy -= K * stride_dy
        C_t -= K * N
        resets -= K
    store_tiles(dh0 + (sequence * segments + segment) * channels * STATES, tiles, inside, dh, MASKED)


@triton.jit
def _retreat(dh, dd, out, c, a, penalty, N: tl.constexpr):
    """The gradient of the state before a token, from that of the state after it and of its output."""
    outs, steps = spread(out, N), spread(dd, N)
    return (
        (dh[0] + outs[0] * c) * tl.exp2(steps[0] * a[0] + penalty),
        (dh[1] + outs[1] * c) * tl.exp2(steps[1] * a[1] + penalty),
        (dh[2] + outs[2] * c) * tl.exp2(steps[2] * a[2] + penalty),
        (dh[3] + outs[3] * c) * tl.exp2(steps[3] * a[3] + penalty),
    )


@kernel
def scan_chain(
    A, elapsed, h0, index, last, channels, blocks, segments,
    STATES: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, HAS_H0: tl.constexpr,
    INDEXED: tl.constexpr,
):  # fmt: skip
    """Join segments: overwrite what each leaves behind a zero state, in `last`, by what it starts from.

    `last` has a state for each segment of each sequence. REVERSE goes against time, for gradients. `h0`, a state for
    each sequence, is what the first segment (REVERSE: the last one) starts from; INDEXED: `index` says where in h0.
    A program has SIZE numbers of the state, and loads what it needs of K segments at once.
    """
    sequence = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = channels * STATES
    inside = at < total
    d = at // STATES
    of_channel = d // 32 * 64 + d % 32
    a = tl.load(A + at, mask=inside, other=0.0) * LOG2E
    h = tl.zeros([SIZE], tl.float32)
    if HAS_H0:
        before = sequence
        if INDEXED:
            before = tl.load(index + sequence).to(tl.int64)
        h = tl.load(h0 + before * total + at, mask=inside, other=0.0)
    for first in range(0, segments, K):
        own, decays = (), ()
        for k in tl.static_range(K):
            slot = sequence * segments + (segments - 1 - first - k if REVERSE else first + k)
            there = inside & (first + k < segments)
            own = own + (tl.load(last + slot * total + at, mask=there, other=0.0),)
            time = tl.load(elapsed + slot * blocks * 64 + of_channel, mask=there, other=0.0)
            boundary = tl.load(elapsed + slot * blocks * 64 + 32 + of_channel, mask=there, other=0.0)
            decays = decays + (tl.exp2(time * a + boundary),)
        for k in tl.static_range(K):
            slot = sequence * segments + (segments - 1 - first - k if REVERSE else first + k)
            tl.store(last + slot * total + at, h, mask=inside & (first + k < segments))
            h = decays[k] * h + own[k]
