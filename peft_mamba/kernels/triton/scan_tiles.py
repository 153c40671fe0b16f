"""What the kernels of the selective scan share: which program does what, and how it holds a state.

A program, one warp, owns 32 channels of one segment of one sequence and walks through its tokens.

Layout. What is per channel is one value a lane. A state is a tuple of four tiles [R, 32], R = N / 4: tile c of lane l
has states (l % 4)·R … + R of channel l ^ c, so that the four lanes of a quad have all states of its four channels
between them. Then B and C take R registers, not N; a sum over states (`over_states`) and its opposite (`spread`) go
through a quad by exchanges with the lanes l ^ 1, l ^ 2 and l ^ 3, in which each lane hands out the same register; and a
sum over channels (`store_sums`) goes through the other 8. Tokens are rows: (T, D) with the stride of a row for u,
delta, z and their gradients, (T, N) in float32 for B and C. States outside of the kernels are (…, D, N) in float32.
"""

import inspect

import triton
import triton.language as tl

from .common import BY_PTX
from .elementwise import LOG2E, softplus_and_slope

# Added to the exponent of a decay where a document starts: exp2 of it is 0.
RESET = tl.constexpr(-1.0e30)
# Up to this many states a lane has its part of a row of B in one load, and `exchange` knows which lane has what.
QUARTERS = tl.constexpr(16)
# What `shared_memory` sets aside for a program: of 12 programs it is all that a multiprocessor of Hopper's has.
SHARED_BYTES = 18432
# Triton compiles a kernel anew where a number is 1, or it or a pointer is a multiple of 16. Only pointers to B, C and
# states gain by that, and lengths that differ from batch to batch would each cost seconds.
NUMBERS = [
    *("length", "channels", "blocks", "offset", "segments", "split", "waves", "programs"),
    *("stride_u", "stride_delta", "stride_z", "stride_dy", "stride_du", "stride_ddelta", "stride_dz"),
]
POINTERS = [
    *("u", "delta", "z", "y", "dy", "du", "ddelta", "dz", "dBC", "D", "bias", "dD", "dbias", "elapsed"),
    *("resets", "lengths", "cu_seqlens"),
]


def kernel(function):
    """triton.jit for the kernels of the scan."""
    names = inspect.signature(function).parameters
    return triton.jit(
        do_not_specialize=[name for name in NUMBERS if name in names],
        do_not_specialize_on_alignment=[name for name in POINTERS if name in names],
    )(function)


@triton.jit
def load(pointer, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def fetch(pointer, mask, MASKED: tl.constexpr):
    """`load` for a value that is needed some turns of the loop later: of half precision its bits, see `value`.

    Carried around a loop as 16 bits, two values would be packed into one register, and packing waits for the load. Of
    what comes from inline assembly the compiler cannot tell that 16 bits hold it.
    """
    if BY_PTX and pointer.dtype.element_ty.primitive_bitwidth == 16:
        if MASKED:
            asm: tl.constexpr = """{
                .reg .pred inside;
                setp.ne.s32 inside, $2, 0;
                mov.u32 $0, 0;
                @inside ld.global.nc.u16 $0, [$1];
            }"""
            return tl.inline_asm_elementwise(asm, "=&r,l,r", [pointer, mask.to(tl.int32)], tl.int32, True, 1)
        else:
            return tl.inline_asm_elementwise("ld.global.nc.u16 $0, [$1];", "=r,l", [pointer], tl.int32, True, 1)
    else:
        return load(pointer, mask, MASKED)


@triton.jit
def value(fetched, pointer):
    """What `fetch` brought from `pointer`, in float32."""
    if BY_PTX and pointer.dtype.element_ty.primitive_bitwidth == 16:
        if pointer.dtype.element_ty == tl.bfloat16:
            return (fetched << 16).to(tl.float32, bitcast=True)
        else:
            return fetched.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return fetched.to(tl.float32)


@triton.jit
def values(fetched, pointer, K: tl.constexpr):
    """A tuple of K."""
    floats = ()
    for k in tl.static_range(K):
        floats = floats + (value(fetched[k], pointer),)
    return floats


@triton.jit
def prefetch(addresses):
    """Ask for the 32 bytes at each of these addresses (int64) to be in the L1 cache soon; nothing waits for them.

    A load that is issued one turn of a loop ahead needs a register all through the loop's body; where there are none
    left, the value goes to the stack at once, which waits for it.
    """
    if BY_PTX:
        tl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [addresses], tl.int32, False, 1)


@triton.jit
def row_sectors(
    u, delta, dy, z, stride_u, stride_delta, stride_dy, stride_z, block, channels,
    K: tl.constexpr, HAS_DY: tl.constexpr, HAS_Z: tl.constexpr, MASK_D: tl.constexpr,
):  # fmt: skip
    """What to `prefetch` of K rows, at most 4, and the distance in bytes to what is one row further, one a lane."""
    tensor = tl.arange(0, 32) // 8
    address, distance = _two_of_each_row(u, stride_u, block, channels, K, MASK_D)
    other, step = _two_of_each_row(delta, stride_delta, block, channels, K, MASK_D)
    address, distance = tl.where(tensor == 1, other, address), tl.where(tensor == 1, step, distance)
    if HAS_DY:
        other, step = _two_of_each_row(dy, stride_dy, block, channels, K, MASK_D)
        address, distance = tl.where(tensor == 2, other, address), tl.where(tensor == 2, step, distance)
    if HAS_Z:
        other, step = _two_of_each_row(z, stride_z, block, channels, K, MASK_D)
        address, distance = tl.where(tensor == 3, other, address), tl.where(tensor == 3, step, distance)
    return address, distance


@triton.jit
def _two_of_each_row(tensor, stride, block, channels, K: tl.constexpr, MASK_D: tl.constexpr):
    """Address and distance for each of 8 lanes: two sectors in each of K rows of a block of channels."""
    size: tl.constexpr = tensor.dtype.element_ty.primitive_bitwidth // 8
    lane = tl.arange(0, 32)
    channel = block * 32 + lane % 2 * 16
    if MASK_D:
        channel = tl.minimum(channel, channels - 1)
    distance = tl.full([32], stride, tl.int64) * size
    return tensor.to(tl.int64) + channel * size + (lane // 2 % K) * distance, distance


@triton.jit
def state_sectors(B, C, K: tl.constexpr, N: tl.constexpr):
    """Addresses of the sectors of K rows of B, and of C: the first 16 of each."""
    lane = tl.arange(0, 32)
    last: tl.constexpr = K * N // 8 - 1
    return tl.where(lane < 16, B.to(tl.int64), C.to(tl.int64)) + tl.minimum(lane % 16, last) * 32


@triton.jit
def place(waves):
    """The program's number, such that those which start out on one multiprocessor are neighbours.

    Programs are dealt out one by one, so that every (programs / waves)-th is on the same one.
    """
    across = tl.num_programs(0) // waves
    return tl.program_id(0) % across * waves + tl.program_id(0) // across


@triton.jit
def program_of(cu_seqlens, length, blocks, offset, segments, split, waves, VARLEN: tl.constexpr):
    """What this program is about: (block of channels, sequence, segment, the sequence's first row, tokens).

    The programs of a segment are neighbours, since they read the same B and C. `offset` is the launch's first sequence.
    """
    program = place(waves)
    block = program % blocks
    index = program // blocks
    sequence = (offset + index // segments).to(tl.int64)
    segment = index % segments
    if VARLEN:
        first = tl.load(cu_seqlens + sequence).to(tl.int64)
        tokens = (tl.load(cu_seqlens + sequence + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = sequence * length
        tokens = length
    if segments > 1:
        tokens = tl.minimum(tokens - segment * split, split)
    return block, sequence, segment, first, tokens


@triton.jit
def first_checkpoint(sequence, segment, first, length, split, CK: tl.constexpr, VARLEN: tl.constexpr):
    """Number of a segment's first checkpoint; a sequence that starts at row r has those from r // CK + sequence on."""
    if VARLEN:
        return first // CK + sequence + segment * (split // CK)
    else:
        return sequence * tl.cdiv(length, CK) + segment * (split // CK)


@triton.jit
def penalty(resets, t, HAS_RESETS: tl.constexpr):
    penalty = 0.0
    if HAS_RESETS:
        penalty = tl.where(tl.load(resets + t) != 0, RESET, 0.0)
    return penalty


@triton.jit
def step_size(raw, t, limit, HAS_LENGTHS: tl.constexpr):
    """Step size and its derivative; both zero on padding, which leaves state and gradient as they are."""
    dd, slope = softplus_and_slope(raw)
    if HAS_LENGTHS:
        dd = tl.where(t < limit, dd, 0.0)
        slope = tl.where(t < limit, slope, 0.0)
    return dd, slope


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
def shared_memory():
    """The address of SHARED_BYTES of this program's own, which `keep_shared` and `load_shared` take.

    Triton has shared memory for its own ends alone. Through global memory, states that are kept for a short while go to
    the L2 cache and, from all programs together, on to DRAM: with that, they are what backward waits for.
    """
    asm: tl.constexpr = "{ .shared .align 16 .b8 states[18432]; mov.u32 $0, states; }"
    return tl.inline_asm_elementwise(asm, "=r,r", [0], tl.int32, False, 1)


@triton.jit
def keep_shared(address, tiles, N: tl.constexpr):
    """A state at `address`, N · 128 bytes of it."""
    at = address + (tl.arange(0, 32)[None, :] + tl.arange(0, N // 4)[:, None] * 32) * 4
    for c in tl.static_range(4):
        tl.inline_asm_elementwise(
            "st.shared.f32 [$1], $2; mov.b32 $0, 0;", "=r,r,f", [at + c * (N * 32), tiles[c]], tl.int32, False, 1
        )


@triton.jit
def load_shared(address, i: tl.constexpr, N: tl.constexpr):
    """Tile i of a state there."""
    at = address + (tl.arange(0, 32)[None, :] + tl.arange(0, N // 4)[:, None] * 32) * 4
    return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [at + i * (N * 32)], tl.float32, False, 1)


@triton.jit
def scratch_offsets(N: tl.constexpr):
    """Of the first tile of a state as kernels keep it for each other; the others lie N · 8 further each."""
    return (tl.arange(0, 32) * (N // 4))[None, :] + tl.arange(0, N // 4)[:, None]


@triton.jit
def load_kept(pointers, N: tl.constexpr):
    return (
        tl.load(pointers),
        tl.load(pointers + N * 8),
        tl.load(pointers + N * 16),
        tl.load(pointers + N * 24),
    )


@triton.jit
def keep(pointers, tiles, N: tl.constexpr):
    for c in tl.static_range(4):
        tl.store(pointers + c * (N * 8), tiles[c])


@triton.jit
def state_tiles(block, channels, STATES: tl.constexpr, N: tl.constexpr):
    """Offsets of a program's tiles in (D, STATES), four of (R, 32), and which of their elements there are."""
    lane = tl.arange(0, 32)
    state = (lane % 4)[None, :] * (N // 4) + tl.arange(0, N // 4)[:, None]
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
def channels_of(
    bias, lengths, block, sequence, segment, split, channels,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, MASK_D: tl.constexpr,
):  # fmt: skip
    """What a program holds throughout: (channels, which of them there are, bias, limit).

    Tokens of the segment at and after `limit` are padding.
    """
    d = block * 32 + tl.arange(0, 32)
    d_ok = d < channels
    bias_d = 0.0
    if HAS_BIAS:
        bias_d = load(bias + d, d_ok, MASK_D)
    limit = 0
    if HAS_LENGTHS:
        limit = tl.load(lengths + sequence).to(tl.int32) - segment * split
    return d, d_ok, bias_d, limit


@triton.jit
def states_at(N: tl.constexpr):
    """Offsets of a lane's states in a row of B or C, (R, 32)."""
    return (tl.arange(0, 32) % 4)[None, :] * (N // 4) + tl.arange(0, N // 4)[:, None]


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
