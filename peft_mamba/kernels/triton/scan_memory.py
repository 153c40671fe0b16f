"""How the kernels of the selective scan come to what is in memory: prefetches, and states that are kept for a while in
shared memory."""

import triton
import triton.language as tl

from .common import BY_PTX

# What `shared_memory` sets aside for a program at most: room for eight states of 16 x 32.
SHARED_BYTES = 16384


@triton.jit
def load(pointer, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0)
    else:
        return tl.load(pointer)


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
    lane = tl.arange(0, 32)
    channel = block * 32 + lane % 2 * 16
    if MASK_D:
        channel = tl.minimum(channel, channels - 1)
    distance = tl.zeros([32], tl.int64) + ((tensor + stride).to(tl.int64) - tensor.to(tl.int64))
    return (tensor + channel).to(tl.int64) + (lane // 2 % K) * distance, distance


@triton.jit
def state_sectors(B, C, K: tl.constexpr, N: tl.constexpr):
    """Addresses of the sectors of K rows of B, and of C: the first 16 of each."""
    lane = tl.arange(0, 32)
    last: tl.constexpr = K * N // 8 - 1
    return tl.where(lane < 16, B.to(tl.int64), C.to(tl.int64)) + tl.minimum(lane % 16, last) * 32


@triton.jit
def shared_memory(MORE: tl.constexpr):
    """The address of memory of this program's own, for `keep_shared` and `load_shared`: of seven states, MORE of eight.

    Triton has shared memory for its own ends alone. Through global memory, states that are kept for a short while go to
    the L2 cache and, from all programs together, on to DRAM: with that, they are what backward waits for. What is not
    taken here is left to the L1 cache, which is small beside it.
    """
    if MORE:
        eight: tl.constexpr = "{ .shared .align 16 .b8 states[16384]; mov.u32 $0, states; }"
        return tl.inline_asm_elementwise(eight, "=r,r", [0], tl.int32, False, 1)
    else:
        seven: tl.constexpr = "{ .shared .align 16 .b8 states[14336]; mov.u32 $0, states; }"
        return tl.inline_asm_elementwise(seven, "=r,r", [0], tl.int32, False, 1)


@triton.jit
def _shared_at(address, N: tl.constexpr):
    """Where the first tile of a state lies, each of its values as 4 bytes; the others lie N · 32 bytes further each."""
    return address + ((tl.arange(0, 32) * (N // 4))[None, :] + tl.arange(0, N // 4)[:, None]) * 4


@triton.jit
def keep_shared(address, tiles, N: tl.constexpr):
    """A state at `address`, N · 128 bytes of it."""
    at = _shared_at(address, N)
    for c in tl.static_range(4):
        if N >= 16:  # a lane's four values of a tile at once
            tl.inline_asm_elementwise(
                "{ st.shared.v4.f32 [$4], {$8, $9, $10, $11}; "
                "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }",
                "=r,=r,=r,=r,r,r,r,r,f,f,f,f",
                [at + c * (N * 32), tiles[c]],
                tl.int32,
                False,
                4,
            )
        else:
            tl.inline_asm_elementwise(
                "st.shared.f32 [$1], $2; mov.b32 $0, 0;", "=r,r,f", [at + c * (N * 32), tiles[c]], tl.int32, False, 1
            )


@triton.jit
def load_shared(address, i: tl.constexpr, N: tl.constexpr):
    """Tile i of a state there."""
    return load_shared_floats(_shared_at(address, N) + i * (N * 32), N >= 16)


@triton.jit
def load_shared_floats(at, FOURS: tl.constexpr):
    """The numbers there; FOURS: a lane's come four at once, which lie together."""
    if FOURS:
        asm: tl.constexpr = "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];"
        return tl.inline_asm_elementwise(asm, "=f,=f,=f,=f,r,r,r,r", [at], tl.float32, False, 4)
    else:
        return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [at], tl.float32, False, 1)


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
