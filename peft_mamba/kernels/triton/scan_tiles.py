"""How a program of the selective scan holds a state, and what it does with it.

What is per channel is one value a lane. A state is a tuple of four tiles [R, 32], R = N / 4: tile c of lane l has
states (l % 4)·R … + R of channel l ^ c, so that the four lanes of a quad have all states of its four channels between
them. Then B and C take R registers, not N; a sum over states (`over_states`) and its opposite (`spread`) go through a
quad by exchanges with the lanes l ^ 1, l ^ 2 and l ^ 3, in which each lane hands out the same register; and a sum over
channels (`store_sums`) goes through the other 8. States outside of the kernels are (…, D, N) in float32.
"""

import triton
import triton.language as tl

from .common import BY_PTX
from .elementwise import LOG2E
from .scan_memory import load

# Up to this many states a lane has its part of a row of B in one load, and `exchange` knows which lane has what.
QUARTERS = tl.constexpr(16)


@triton.jit
def exchange(x, WIDTH: tl.constexpr, N: tl.constexpr):
    """x of the lane whose number differs in the bits of WIDTH; the last dimension, of one or two, is the lanes."""
    if BY_PTX and N <= QUARTERS:
        # Triton's own gather takes a register or two for every set of lanes to exchange with, and has none to spare.
        asm: tl.constexpr = "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        return tl.inline_asm_elementwise(asm, "=f,f,r", [x, WIDTH], tl.float32, True, 1)
    else:
        lane = tl.arange(0, 32) ^ WIDTH
        if len(x.shape) == 1:
            return tl.gather(x, lane, 0)
        else:
            return tl.gather(x, tl.broadcast_to(lane[None, :], x.shape), 1)


@triton.jit
def own(x, i: tl.constexpr, N: tl.constexpr):
    """Of one value a channel, (32,), those of the channels of tile i, (1, 32)."""
    if i == 0:
        return x[None, :]
    else:
        return exchange(x[None, :], i, N)


@triton.jit
def spread(x, N: tl.constexpr):
    """All four of `own`."""
    return own(x, 0, N), own(x, 1, N), own(x, 2, N), own(x, 3, N)


@triton.jit
def over_states(tiles, N: tl.constexpr):
    """Sum of a tile a channel, four of (R, 32), over the states, (32,)."""
    even = tl.sum(tiles[0], 0) + exchange(tl.sum(tiles[2], 0), 2, N)
    odd = tl.sum(tiles[1], 0) + exchange(tl.sum(tiles[3], 0), 2, N)
    return even + exchange(odd, 1, N)


@triton.jit
def _halve(top, bottom, WIDTH: tl.constexpr, N: tl.constexpr):
    """Add up pairs of lanes and share the result: lanes whose bit WIDTH is 0 get that of `top`; both are [R, 32]."""
    upper = ((tl.arange(0, 32) & WIDTH) != 0)[None, :]
    return tl.where(upper, bottom, top) + exchange(tl.where(upper, top, bottom), WIDTH, N)


@triton.jit
def _narrow(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    """Add up the pairs of lanes that differ in bit WIDTH; of an [ROWS, 32] tile each keeps one half, if ROWS > 1.

    Giving half of the rows away at each exchange takes about one shuffle a row to sum over a warp, where a butterfly of
    each row takes five.
    """
    if ROWS > 1:
        top, bottom = tl.split(tl.permute(tl.reshape(x, [2, ROWS // 2, 32]), (1, 2, 0)))
        return _halve(top, bottom, WIDTH, N)
    else:
        return x + exchange(x, WIDTH, N)


@triton.jit
def sums_at(N: tl.constexpr):
    """Where `store_sums` stores, as offsets."""
    R: tl.constexpr = N // 4
    lane = tl.arange(0, 32)
    at = lane // 16 * N + lane % 4 * R + (lane // 8 % 2) * (R // 2) + (lane // 4 % 2) * (R // 4)
    if R >= 4:
        return at[None, :] + tl.arange(0, R // 4)[:, None]
    else:
        return at[None, :]


@triton.jit
def store_sums(pointers, first, second, N: tl.constexpr):
    """Store the sums of two (R, 32) tiles over their lanes' quads, N and N of them, at what `sums_at` is added to."""
    R: tl.constexpr = N // 4
    x = _halve(first, second, 16, N)
    x = _narrow(_narrow(x, R, 8, N), R // 2, 4, N)
    lane = tl.arange(0, 32)
    if R >= 4:
        tl.store(pointers, x)
    elif R == 2:  # two lanes have each sum
        tl.store(pointers, x, mask=(lane // 4 % 2 == 0)[None, :])
    else:
        tl.store(pointers, x, mask=(lane // 4 % 4 == 0)[None, :])


@triton.jit
def no_state(N: tl.constexpr):
    zero = tl.zeros([N // 4, 32], tl.float32)
    return zero, zero, zero, zero


@triton.jit
def load_tiles(pointer, offsets, inside, MASKED: tl.constexpr):
    return (
        load(pointer + offsets[0], inside[0], MASKED),
        load(pointer + offsets[1], inside[1], MASKED),
        load(pointer + offsets[2], inside[2], MASKED),
        load(pointer + offsets[3], inside[3], MASKED),
    )


@triton.jit
def store_tiles(pointer, offsets, inside, tiles, MASKED: tl.constexpr):
    for c in tl.static_range(4):
        if MASKED:
            tl.store(pointer + offsets[c], tiles[c], mask=inside[c])
        else:
            tl.store(pointer + offsets[c], tiles[c])


@triton.jit
def states_at(N: tl.constexpr):
    """Which states a lane has, (R, 32): their offsets in a row of B or C."""
    return (tl.arange(0, 32) % 4)[None, :] * (N // 4) + tl.arange(0, N // 4)[:, None]


@triton.jit
def state_tiles(block, channels, STATES: tl.constexpr, N: tl.constexpr):
    """Offsets of a program's tiles in (D, STATES), four of (R, 32), and which of their elements there are."""
    lane = tl.arange(0, 32)
    state = states_at(N)
    offsets, inside = (), ()
    for c in tl.static_range(4):
        channel = (block * 32 + (lane ^ c))[None, :]
        offsets = offsets + (channel * STATES + state,)
        inside = inside + ((channel < channels) & (state < STATES),)
    return offsets, inside


@triton.jit
def decay_rates(A, offsets, inside, N: tl.constexpr, MASKED: tl.constexpr):
    """A · log2(e) of a program's channels; NaN, and with it all results, should lanes not be what `exchange` takes for
    granted."""
    first, second, third, fourth = load_tiles(A, offsets, inside, MASKED)
    lane = tl.broadcast_to(tl.arange(0, 32)[None, :].to(tl.float32), first.shape)
    other = tl.broadcast_to((tl.arange(0, 32) ^ 1)[None, :].to(tl.float32), first.shape)
    first = tl.where(exchange(lane, 1, N) == other, first, float("nan"))
    return first * LOG2E, second * LOG2E, third * LOG2E, fourth * LOG2E


@triton.jit
def load_states_inside(pointers, inside, N: tl.constexpr):
    """A row of B or C where `inside`, a scalar, is true, else zeros; (R, 32)."""
    return tl.load(pointers, mask=inside & (states_at(N) >= 0), other=0.0)


@triton.jit
def advance(h, dd, x, b, a, penalty, N: tl.constexpr):
    """The recurrence: a state after one more token."""
    steps, inputs = spread(dd, N), spread(dd * x, N)
    return (
        tl.exp2(steps[0] * a[0] + penalty) * h[0] + inputs[0] * b,
        tl.exp2(steps[1] * a[1] + penalty) * h[1] + inputs[1] * b,
        tl.exp2(steps[2] * a[2] + penalty) * h[2] + inputs[2] * b,
        tl.exp2(steps[3] * a[3] + penalty) * h[3] + inputs[3] * b,
    )


@triton.jit
def state_pairs(B, C, ok, K: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """K rows of B and of C, as tuples; both are pointers as of `states_at`."""
    bs, cs = (), ()
    for k in tl.static_range(K):
        if MASKED:
            bs = bs + (load_states_inside(B + k * N, ok, N),)
            cs = cs + (load_states_inside(C + k * N, ok, N),)
        else:
            bs = bs + (tl.load(B + k * N),)
            cs = cs + (tl.load(C + k * N),)
    return bs, cs
