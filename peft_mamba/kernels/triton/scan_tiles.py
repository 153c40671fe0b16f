"""What the kernels of the selective scan share: which program does what, and how it holds a state.

A program, one warp, owns 32 channels of one segment of one sequence and walks through its tokens.

Layout. What is per channel is one value a lane. A state is a tile [R, 4, 32], R = N / 4, whose last dimension is the
lanes: lane l has states (l % 4)·R … + R of the four channels l // 4 · 4 … + 4. So B and C take R registers, not N, a
sum over states (`over_states`) goes through the 4 lanes of such a quad and leaves each of them one channel, and a sum
over channels (`store_sums`) goes through the other 8. In memory a tile lies as it is written here. Tokens are rows:
(T, D) with the stride of a row for u, delta, z and their gradients, (T, N) in float32 for B and C. Triton lays a tile
out over registers and lanes after the loads that it comes from, and would give a lane several neighbours if it knew a
tile's pointer to be a multiple of 16 bytes; hence `POINTERS`.
"""

import inspect

import torch
import triton
import triton.language as tl

from .common import interpreted
from .elementwise import LOG2E, halve, narrow, softplus_and_slope

# Added to the exponent of a decay where a document starts: exp2 of it is 0.
RESET = tl.constexpr(-1.0e30)
# Whether kernels are compiled for NVIDIA's GPUs: not for AMD's, nor run by Triton's interpreter.
BY_PTX = tl.constexpr(torch.version.hip is None and not interpreted())
# Triton compiles a kernel anew where a number is 1, or it or a pointer is a multiple of 16. Nothing here gains by that:
# pointers to tiles must not be known as aligned (see above), of the others only those to B and C matter, and lengths
# that differ from batch to batch would each cost seconds.
NUMBERS = [
    *("length", "channels", "blocks", "offset", "segments", "split", "waves", "programs"),
    *("stride_u", "stride_delta", "stride_z", "stride_dy", "stride_du", "stride_ddelta", "stride_dz"),
]
POINTERS = [
    *("A", "h0", "last", "checkpoints", "scratch", "dlast", "dA", "dh0"),
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
def tile_offsets(N: tl.constexpr):
    """Offsets of a tile's elements, (R, 4, 32)."""
    i = tl.arange(0, N // 4)[:, None, None] * 128 + tl.arange(0, 4)[None, :, None] * 32
    return i + tl.arange(0, 32)[None, None, :]


@triton.jit
def channels_of(
    A, bias, lengths, block, sequence, segment, split, channels,
    N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, MASK_D: tl.constexpr,
):  # fmt: skip
    """What a program holds throughout: (channels, which of them there are, tile offsets, A · log2(e), bias, limit).

    Tokens of the segment at and after `limit` are padding.
    """
    d = block * 32 + tl.arange(0, 32)
    d_ok = d < channels
    tile = tile_offsets(N)
    a = tl.load(A + block * (N * 32) + tile) * LOG2E
    bias_d = 0.0
    if HAS_BIAS:
        bias_d = load(bias + d, d_ok, MASK_D)
    limit = 0
    if HAS_LENGTHS:
        limit = tl.load(lengths + sequence).to(tl.int32) - segment * split
    return d, d_ok, tile, a, bias_d, limit


@triton.jit
def load_states(pointer, N: tl.constexpr):
    """A row of B or C, as (R, 1, 32)."""
    lane = tl.arange(0, 32)
    return tl.load(pointer + (lane % 4)[None, :] * (N // 4) + tl.arange(0, N // 4)[:, None])[:, None, :]


@triton.jit
def load_states_inside(pointer, inside, N: tl.constexpr):
    """The same where `inside`, a scalar, is true, else zeros."""
    lane = tl.arange(0, 32)
    at = (lane % 4)[None, :] * (N // 4) + tl.arange(0, N // 4)[:, None]
    return tl.load(pointer + at, mask=inside & (at >= 0), other=0.0)[:, None, :]


@triton.jit
def spread(x):
    """One value a channel, (32,), to where the states of the channels are: (1, 4, 32)."""
    owner = (tl.arange(0, 32) // 4 * 4)[None, :] + tl.arange(0, 4)[:, None]
    return tl.gather(tl.broadcast_to(x[None, :], [4, 32]), owner, 1)[None, :, :]


@triton.jit
def over_states(x):
    """Sum of an (R, 4, 32) tile over the states of each channel, (32,)."""
    return tl.reshape(narrow(narrow(tl.sum(x, 0), 4, 2), 2, 1), [32])


@triton.jit
def store_sums(pointer, first, second, N: tl.constexpr):
    """Store the sums of two (R, 4, 32) tiles over their 32 channels, N and N of them, at pointer[0 … 2·N)."""
    R: tl.constexpr = N // 4
    x = halve(tl.sum(first, 1), tl.sum(second, 1), 16)
    x = narrow(narrow(x, R, 8), R // 2, 4)
    lane = tl.arange(0, 32)
    half: tl.constexpr = R // 2
    quarter: tl.constexpr = R // 4
    at = lane // 16 * N + lane % 4 * R + (lane // 8 % 2) * half + (lane // 4 % 2) * quarter
    if R >= 4:
        tl.store(pointer + at[None, :] + tl.arange(0, R // 4)[:, None], x)
    elif R == 2:  # two lanes have each sum
        tl.store(pointer + at[None, :], x, mask=(lane // 4 % 2 == 0)[None, :])
    else:
        tl.store(pointer + at[None, :], x, mask=(lane // 4 % 4 == 0)[None, :])


@triton.jit
def advance(h, dd, x, b, a, penalty):
    """The recurrence: a tile of states after one more token."""
    return tl.exp2(spread(dd) * a + penalty) * h + spread(dd * x) * b


@triton.jit
def state_pairs(B, C, ok, K: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """K rows of B and of C, as tuples."""
    bs, cs = (), ()
    for k in tl.static_range(K):
        if MASKED:
            bs = bs + (load_states_inside(B + k * N, ok, N),)
            cs = cs + (load_states_inside(C + k * N, ok, N),)
        else:
            bs = bs + (load_states(B + k * N, N),)
            cs = cs + (load_states(C + k * N, N),)
    return bs, cs
