"""The selective scan forward: one pass, with a checkpoint of the state every CK tokens for backward."""

import triton
import triton.language as tl

from .elementwise import sigmoid
from .scan_tiles import (
    advance,
    channels_of,
    first_checkpoint,
    floats,
    kernel,
    load,
    load_states,
    over_states,
    penalty,
    place,
    program_of,
    state_pairs,
    step_size,
)


@kernel
def scan_forward(
    u, delta, A, B, C, D, z, bias, resets, lengths, cu_seqlens, h0, y, checkpoints, last,
    stride_u, stride_delta, stride_z, length, channels, blocks, offset, segments, split, waves, programs,
    N: tl.constexpr, K: tl.constexpr, CK: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, VARLEN: tl.constexpr, HAS_H0: tl.constexpr, SAVE: tl.constexpr, LAST: tl.constexpr,
    MASK_D: tl.constexpr,
):  # fmt: skip
    """y of a segment from its initial state; on request its last state, and the checkpoints for backward."""
    if place(waves) >= programs:
        return
    block, sequence, segment, first, tokens = program_of(
        cu_seqlens, length, blocks, offset, segments, split, waves, VARLEN
    )
    d, d_ok, tile, a, bias_d, limit = channels_of(
        A, bias, lengths, block, sequence, segment, split, channels, N, HAS_BIAS, HAS_LENGTHS, MASK_D
    )
    skip = 0.0
    if HAS_D:
        skip = load(D + d, d_ok, MASK_D)
    slot = ((sequence * segments + segment) * blocks + block) * (N * 32)
    h = tl.zeros([N // 4, 4, 32], tl.float32)
    if HAS_H0:
        h += tl.load(h0 + slot + tile)
    checkpoint = first_checkpoint(sequence, segment, first, length, split, CK, VARLEN)
    row = first + segment * split
    u += row * stride_u
    delta += row * stride_delta
    z += row * stride_z
    y += row * channels
    B += row * N
    C += row * N
    resets += row
    whole = tokens // K * K
    # The loads of one group are issued while the group before the last is computed, those of B and C, which come from
    # the L2 cache, while the last is. They end up at the end of the loop's body, whatever their place in it, since
    # nothing in it needs them; so nothing there may wait for them either.
    some = d_ok & (whole > 0)
    xs, raws, gates = _rows(u, delta, z, stride_u, stride_delta, stride_z, d, some, K, HAS_Z, True)
    bs, cs = state_pairs(B, C, whole > 0, K, N, True)
    xs, raws, gates = floats(xs, K), floats(raws, K), floats(gates, K)
    ahead = tl.where(whole > K, K, 0).to(tl.int64)
    next_xs, next_raws, next_gates = _rows(
        u + ahead * stride_u, delta + ahead * stride_delta, z + ahead * stride_z, stride_u, stride_delta, stride_z,
        d, some, K, HAS_Z, True,
    )  # fmt: skip
    for t in range(0, whole, K):
        if SAVE:
            if t % CK == 0:
                tl.store(checkpoints + ((checkpoint + t // CK) * blocks + block) * (N * 32) + tile, h)
        for k in tl.static_range(K):
            h, out = _step(
                h, xs[k], raws[k] + bias_d, gates[k], bs[k], cs[k], a, skip, t + k, limit, resets,
                HAS_Z, HAS_RESETS, HAS_LENGTHS,
            )  # fmt: skip
            tl.store(y + k * channels + d, out.to(y.dtype.element_ty), mask=d_ok)
        y += K * channels
        xs, raws, gates = floats(next_xs, K), floats(next_raws, K), floats(next_gates, K)
        ahead = tl.minimum(t + 2 * K, whole - K).to(tl.int64)
        next_xs, next_raws, next_gates = _rows(
            u + ahead * stride_u, delta + ahead * stride_delta, z + ahead * stride_z, stride_u, stride_delta, stride_z,
            d, d_ok, K, HAS_Z, MASK_D,
        )  # fmt: skip
        ahead = tl.minimum(t + K, whole - K).to(tl.int64)
        bs, cs = state_pairs(B + ahead * N, C + ahead * N, True, K, N, False)
    u += whole.to(tl.int64) * stride_u
    delta += whole.to(tl.int64) * stride_delta
    z += whole.to(tl.int64) * stride_z
    B += whole.to(tl.int64) * N
    C += whole.to(tl.int64) * N
    for t in range(whole, tokens):
        if SAVE:
            if t % CK == 0:
                tl.store(checkpoints + ((checkpoint + t // CK) * blocks + block) * (N * 32) + tile, h)
        x, raw, gate = _rows(u, delta, z, stride_u, stride_delta, stride_z, d, d_ok, 1, HAS_Z, MASK_D)
        h, out = _step(
            h, x[0].to(tl.float32), raw[0].to(tl.float32) + bias_d, gate[0].to(tl.float32), load_states(B, N),
            load_states(C, N), a, skip, t, limit, resets, HAS_Z, HAS_RESETS, HAS_LENGTHS,
        )  # fmt: skip
        tl.store(y + d, out.to(y.dtype.element_ty), mask=d_ok)
        u += stride_u
        delta += stride_delta
        z += stride_z
        y += channels
        B += N
        C += N
    if LAST:
        tl.store(last + slot + tile, h)


@triton.jit
def _rows(
    first, second, third, stride_first, stride_second, stride_third, d, d_ok,
    K: tl.constexpr, THIRD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """K tokens of three tensors, as tuples of what `load` gives; without THIRD the first stands for the third."""
    firsts, seconds, thirds = (), (), ()
    for k in tl.static_range(K):
        firsts = firsts + (load(first + k * stride_first + d, d_ok, MASKED),)
        seconds = seconds + (load(second + k * stride_second + d, d_ok, MASKED),)
        if THIRD:
            thirds = thirds + (load(third + k * stride_third + d, d_ok, MASKED),)
        else:
            thirds = thirds + (firsts[k],)
    return firsts, seconds, thirds


@triton.jit
def _step(
    h, x, raw, gate, b, c, a, skip, t, limit, resets,
    HAS_Z: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """(state after token t, its output)."""
    dd, slope = step_size(raw, t, limit, HAS_LENGTHS)
    h = advance(h, dd, x, b, a, penalty(resets, t, HAS_RESETS))
    out = over_states(h * c) + skip * x
    if HAS_Z:
        out *= gate * sigmoid(gate)
    return h, out
