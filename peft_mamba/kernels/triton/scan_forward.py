"""The selective scan forward: one pass, with a checkpoint of the state every CK tokens for backward."""

import triton
import triton.language as tl

from .elementwise import sigmoid
from .scan_memory import keep, load, prefetch, row_sectors, scratch_offsets, state_sectors
from .scan_programs import channels_of, first_checkpoint, kernel, penalty, place, program_of, step_size
from .scan_ring import DELTA, U, Z, begin_copies, rows_of, states_of, take_group
from .scan_tiles import (
    advance,
    decay_rates,
    load_tiles,
    no_state,
    over_states,
    state_pairs,
    state_tiles,
    states_at,
    store_tiles,
)


@kernel
def scan_forward(
    u, delta, A, B, C, D, z, bias, resets, lengths, cu_seqlens, h0, index, y, checkpoints, last,
    stride_u, stride_delta, stride_z, stride_y, length, channels, blocks, offset, segments, split, waves, programs,
    STATES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, CK: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, VARLEN: tl.constexpr, HAS_H0: tl.constexpr, INDEXED: tl.constexpr,
    SAVE: tl.constexpr, LAST: tl.constexpr, MASK_D: tl.constexpr, MASKED: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """y of a segment from its initial state; on request its last state, and the checkpoints for backward.

    INDEXED: h0 is a pool, and `index` says for each sequence, which are whole then, where in it its state is.
    """
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
    skip = 0.0
    if HAS_D:
        skip = load(D + d, d_ok, MASK_D)
    slot = (sequence * segments + segment) * channels * STATES
    h = no_state(N)
    if HAS_H0:
        before = slot
        if INDEXED:
            before = tl.load(index + sequence) * channels * STATES
        h = load_tiles(h0 + before, tiles, inside, MASKED)
    checkpoint = first_checkpoint(sequence, segment, first, length, split, CK, VARLEN)
    row = first + segment * split
    u += row * stride_u
    delta += row * stride_delta
    z += row * stride_z
    y += row * stride_y
    B += row * N
    C += row * N
    resets += row
    checkpoints += (checkpoint * blocks + block) * (N * 32)
    whole = tokens // K * K
    if RING:
        ring, turn, rows, distance, there, states = begin_copies(
            u, delta, u, z, stride_u, stride_delta, stride_u, stride_z, B, C, block, 0, whole > 0,
            K, RING, False, HAS_Z,
        )  # fmt: skip
    else:
        rows, distance = row_sectors(
            u, delta, u, z, stride_u, stride_delta, stride_u, stride_z, block, channels, K, False, HAS_Z, MASK_D
        )
        sectors_BC = state_sectors(B, C, K, N)
    B_t, C_t = B + states_at(N), C + states_at(N)
    for t in range(0, whole, K):
        if SAVE:
            if t % CK == 0:
                keep(checkpoints + t // CK * blocks.to(tl.int64) * (N * 32) + scratch_offsets(N), h, N)
        if RING:
            group, turn, rows, states = take_group(
                ring, turn, rows, distance, there, states, t + K < whole, K, False, RING
            )
            xs, raws = rows_of(group, U, u, K, RING), rows_of(group, DELTA, delta, K, RING)
            gates = rows_of(group, Z, z, K, RING) if HAS_Z else xs
            bs, cs = states_of(group, K, RING)
        else:
            ahead = tl.minimum(t + K, whole - K).to(tl.int64)
            prefetch(sectors_BC + ahead * (N * 4))
            prefetch(rows + ahead * distance)
            xs, raws, gates = _rows(u, delta, z, stride_u, stride_delta, stride_z, d, d_ok, K, HAS_Z, MASK_D)
            bs, cs = state_pairs(B_t, C_t, True, K, N, False)
        for k in tl.static_range(K):
            h, out = _step(
                h, xs[k], raws[k] + bias_d, gates[k], bs[k], cs[k], a, skip, t + k, limit, resets,
                N, HAS_Z, HAS_RESETS, HAS_LENGTHS,
            )  # fmt: skip
            tl.store(y + k * stride_y + d, out.to(y.dtype.element_ty), mask=d_ok)
        y += K * stride_y
        if not RING:
            u += K * stride_u
            delta += K * stride_delta
            z += K * stride_z
            B_t += K * N
            C_t += K * N
    if RING:
        u += whole.to(tl.int64) * stride_u
        delta += whole.to(tl.int64) * stride_delta
        z += whole.to(tl.int64) * stride_z
        B_t += whole.to(tl.int64) * N
        C_t += whole.to(tl.int64) * N
    for t in range(whole, tokens):
        if SAVE:
            if t % CK == 0:
                keep(checkpoints + t // CK * blocks.to(tl.int64) * (N * 32) + scratch_offsets(N), h, N)
        x, raw, gate = _rows(u, delta, z, stride_u, stride_delta, stride_z, d, d_ok, 1, HAS_Z, MASK_D)
        h, out = _step(
            h, x[0], raw[0] + bias_d, gate[0], tl.load(B_t), tl.load(C_t), a, skip, t, limit, resets,
            N, HAS_Z, HAS_RESETS, HAS_LENGTHS,
        )  # fmt: skip
        tl.store(y + d, out.to(y.dtype.element_ty), mask=d_ok)
        u += stride_u
        delta += stride_delta
        z += stride_z
        y += stride_y
        B_t += N
        C_t += N
    if LAST:
        store_tiles(last + slot, tiles, inside, h, MASKED)


@triton.jit
def _rows(
    u, delta, z, stride_u, stride_delta, stride_z, d, d_ok,
    K: tl.constexpr, HAS_Z: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """K tokens of u, delta and z as tuples in float32; u stands for an absent z."""
    xs, raws, gates = (), (), ()
    for k in tl.static_range(K):
        xs = xs + (load(u + k * stride_u + d, d_ok, MASKED).to(tl.float32),)
        raws = raws + (load(delta + k * stride_delta + d, d_ok, MASKED).to(tl.float32),)
        if HAS_Z:
            gates = gates + (load(z + k * stride_z + d, d_ok, MASKED).to(tl.float32),)
        else:
            gates = gates + (xs[k],)
    return xs, raws, gates


@triton.jit
def _step(
    h, x, raw, gate, b, c, a, skip, t, limit, resets,
    N: tl.constexpr, HAS_Z: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """(state after token t, its output)."""
    dd, slope = step_size(raw, t, limit, HAS_LENGTHS)
    h = advance(h, dd, x, b, a, penalty(resets, t, HAS_RESETS), N)
    out = over_states((h[0] * c, h[1] * c, h[2] * c, h[3] * c), N) + skip * x
    if HAS_Z:
        out *= gate * sigmoid(gate)
    return h, out
