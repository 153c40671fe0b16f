"""Rows of the selective scan's inputs, which are copied to shared memory (cp.async) while others are computed.

A load that is issued early needs a register until its use, and the kernels of the selective scan have none to spare: a
copy needs none. Two groups of K tokens have room, the one that is computed and the one that comes next. A group lies as
(4, K, 32) numbers of u, delta, dy and z, then (2, K, 16) of B and C, which are float32. A lane copies pieces of 16
bytes, so all rows must begin at multiples of it.
"""

import triton
import triton.language as tl

from .scan_memory import load_shared_floats
from .scan_tiles import states_at

# With so many, the states of four tokens are a piece a lane, and a lane's part of a tile is one.
STATES = tl.constexpr(16)
# What of a group is which tensor.
U, DELTA, DY, Z = (tl.constexpr(i) for i in range(4))


def ring_bytes(K: int, item: int) -> int:
    """Of two groups of K tokens in numbers of `item` bytes."""
    return 2 * K * (4 * 32 * item + 2 * STATES.value * 4)


def _reserve(K: int, item: int) -> tl.constexpr:
    return tl.constexpr(f"{{ .shared .align 16 .b8 ring[{ring_bytes(K, item)}]; mov.u32 $0, ring; }}")


_RESERVE_2_HALF, _RESERVE_2_FLOAT = _reserve(2, 2), _reserve(2, 4)
_RESERVE_4_HALF, _RESERVE_4_FLOAT = _reserve(4, 2), _reserve(4, 4)


@triton.jit
def _ring_memory(K: tl.constexpr, ITEM: tl.constexpr):
    """The address of a program's room for two groups of 2 or of 4 tokens."""
    if K == 2 and ITEM == 2:
        return tl.inline_asm_elementwise(_RESERVE_2_HALF, "=r,r", [0], tl.int32, False, 1)
    elif K == 2:
        return tl.inline_asm_elementwise(_RESERVE_2_FLOAT, "=r,r", [0], tl.int32, False, 1)
    elif ITEM == 2:
        return tl.inline_asm_elementwise(_RESERVE_4_HALF, "=r,r", [0], tl.int32, False, 1)
    else:
        return tl.inline_asm_elementwise(_RESERVE_4_FLOAT, "=r,r", [0], tl.int32, False, 1)


@triton.jit
def _row_pieces(
    u, delta, dy, z, stride_u, stride_delta, stride_dy, stride_z, block,
    ITEM: tl.constexpr, HAS_DY: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """For `_copy_group`, one a lane: the first piece of the first rows, bytes from row to row, whether there is any."""
    tensor = tl.arange(0, 32) // 8
    address, distance = _piece(u, stride_u, block, ITEM)
    other, step = _piece(delta, stride_delta, block, ITEM)
    address, distance = tl.where(tensor == 1, other, address), tl.where(tensor == 1, step, distance)
    there = tensor < 2
    if HAS_DY:
        there |= tensor == 2
        other, step = _piece(dy, stride_dy, block, ITEM)
        address, distance = tl.where(tensor == 2, other, address), tl.where(tensor == 2, step, distance)
    if HAS_Z:
        there |= tensor == 3
        other, step = _piece(z, stride_z, block, ITEM)
        address, distance = tl.where(tensor == 3, other, address), tl.where(tensor == 3, step, distance)
    return address, distance, there


@triton.jit
def _piece(tensor, stride, block, ITEM: tl.constexpr):
    """Address and distance for each of 8 lanes: the pieces of two rows in half precision, of one in float32."""
    lane = tl.arange(0, 32) % 8
    distance = tl.zeros([32], tl.int64) + ((tensor + stride).to(tl.int64) - tensor.to(tl.int64))
    at = (tensor + block * 32 + lane % (2 * ITEM) * (16 // ITEM)).to(tl.int64)
    return at + lane // (2 * ITEM) * distance, distance


@triton.jit
def _state_pieces(B, C):
    """For `_copy_group`, one a lane: the first piece of B, or of C for the upper half of the lanes."""
    lane = tl.arange(0, 32)
    return tl.where(lane < 16, B.to(tl.int64), C.to(tl.int64)) + lane % 16 * 16


@triton.jit
def _group_of(ring, turn, K: tl.constexpr, ITEM: tl.constexpr):
    """Where the groups whose turn it is, 0 or 1, have their room."""
    return ring + turn * (K * (128 * ITEM + 128))


@triton.jit
def _copy_group(ring, turn, rows, distance, there, states, some, K: tl.constexpr, ITEM: tl.constexpr):
    """Begin to copy K rows of every tensor, from those at `rows` and `states` on; of none unless `some`."""
    group = _group_of(ring, turn, K, ITEM)
    lane = tl.arange(0, 32)
    at = group + lane // 8 * (K * 32 * ITEM) + lane % 8 * 16
    for i in tl.static_range(K * ITEM // 4):
        _copy(at + i * 128, rows + i * (4 // ITEM) * distance, there & some)
    _copy(group + K * 128 * ITEM + lane // 16 * (K * 64) + lane % 16 * 16, states, (lane % 16 < K * 4) & some)


@triton.jit
def copy_state(to, kept, some):
    """Begin to copy a state, from what `keep` has written to where `load_shared` looks; none unless `some`."""
    lane = tl.arange(0, 32)
    from_here = kept.to(tl.int64) + lane * 16
    for c in tl.static_range(4):
        _copy(to + lane * 16 + c * 512, from_here + c * 512, (lane >= 0) & some)


@triton.jit
def _copy(to, address, there):
    asm: tl.constexpr = """{
        .reg .pred there;
        setp.ne.s32 there, $3, 0;
        @there cp.async.ca.shared.global [$1], [$2], 16;
        mov.b32 $0, 0;
    }"""
    tl.inline_asm_elementwise(asm, "=r,r,l,r", [to, address, there.to(tl.int32)], tl.int32, False, 1)


@triton.jit
def fetch_state(kept):
    """Ask for a state that `keep` has written to be in the L2 cache soon."""
    lane = tl.arange(0, 32)
    for i in tl.static_range(2):
        _fetch(kept.to(tl.int64) + (i * 32 + lane) * 32)


@triton.jit
def fetch_rows(tensor, stride, block, ROWS: tl.constexpr):
    """Ask for 32 channels of so many rows to be there."""
    lane = tl.arange(0, 32)
    sectors: tl.constexpr = tensor.dtype.element_ty.primitive_bitwidth // 8
    for i in tl.static_range(ROWS * sectors // 32):
        sector = i * 32 + lane
        row = tensor + block * 32 + (sector // sectors).to(tl.int64) * stride
        _fetch(row.to(tl.int64) + sector % sectors * 32)


@triton.jit
def _fetch(address):
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], tl.int32, False, 1)


@triton.jit
def begin_copies(
    u, delta, dy, z, stride_u, stride_delta, stride_dy, stride_z, B, C, block, first, some,
    K: tl.constexpr, ITEM: tl.constexpr, HAS_DY: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """Begin to copy the group of K rows from `first` on, if there is `some`.

    Returns the ring, turn, rows, distance, there and states for `take_group`.
    """
    turn = tl.zeros([], tl.int32)
    ring = _ring_memory(K, ITEM)
    rows, distance, there = _row_pieces(
        u, delta, dy, z, stride_u, stride_delta, stride_dy, stride_z, block, ITEM, HAS_DY, HAS_Z
    )
    rows += first * distance
    states = _state_pieces(B + first * STATES, C + first * STATES)
    _copy_group(ring, turn, rows, distance, there, states, some, K, ITEM)
    return ring, turn, rows, distance, there, states


@triton.jit
def take_group(
    ring, turn, rows, distance, there, states, more, K: tl.constexpr, BACK: tl.constexpr, ITEM: tl.constexpr
):  # fmt: skip
    """Wait for the group whose turn it is, and begin to copy the next one, BACK the one before, if there is `more`.

    Returns where the group is, and turn, rows and states for the next call.
    """
    _copied()
    group = _group_of(ring, turn, K, ITEM)
    turn ^= 1
    if BACK:
        rows -= K * distance
        states -= K * (STATES * 4)
    else:
        rows += K * distance
        states += K * (STATES * 4)
    _copy_group(ring, turn, rows, distance, there, states, more, K, ITEM)
    return group, turn, rows, states


@triton.jit
def _copied():
    """Wait until all that was to be copied is there, for all lanes; none still reads what is copied to next."""
    asm: tl.constexpr = "cp.async.wait_all; bar.warp.sync 0xffffffff; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,r", [0], tl.int32, False, 1)


@triton.jit
def rows_of(group, TENSOR: tl.constexpr, pointer, K: tl.constexpr, ITEM: tl.constexpr):
    """K rows of one tensor, of `pointer`'s dtype, as a tuple in float32."""
    at = group + TENSOR * (K * 32 * ITEM) + tl.arange(0, 32) * ITEM
    rows = ()
    for k in tl.static_range(K):
        rows = rows + (_number(at + k * (32 * ITEM), pointer),)
    return rows


@triton.jit
def _number(at, pointer):
    if pointer.dtype.element_ty == tl.float32:
        return load_shared_floats(at, False)
    else:
        bits = tl.inline_asm_elementwise("ld.shared.u16 $0, [$1];", "=r,r", [at], tl.int32, False, 1)
        if pointer.dtype.element_ty == tl.bfloat16:
            return (bits << 16).to(tl.float32, bitcast=True)
        else:
            return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def states_of(group, K: tl.constexpr, ITEM: tl.constexpr):
    """K rows of B and of C, as tuples of (4, 32)."""
    at = group + K * 128 * ITEM + states_at(STATES) * 4
    bs, cs = (), ()
    for k in tl.static_range(K):
        bs = bs + (load_shared_floats(at + k * 64, True),)
        cs = cs + (load_shared_floats(at + (K + k) * 64, True),)
    return bs, cs
