"""The selective scan backward.

A stretch of CK tokens starts from its checkpoint: a pass forward keeps the state before each group of K tokens in
scratch memory, then the groups are taken from the last to the first, each recomputed in registers.
"""

import triton
import triton.language as tl

from .elementwise import LN2, sigmoid
from .scan_tiles import (
    advance,
    channels_of,
    first_checkpoint,
    kernel,
    load,
    load_states,
    over_states,
    penalty,
    place,
    prefetch,
    program_of,
    row_sectors,
    spread,
    state_pairs,
    state_sectors,
    step_size,
    store_sums,
)


@kernel
def scan_backward(
    u, delta, A, B, C, D, z, bias, resets, lengths, cu_seqlens, checkpoints, dy, dlast, scratch,
    du, ddelta, dz, dBC, dA, dD, dbias, dh0,
    stride_u, stride_delta, stride_z, stride_dy, stride_du, stride_ddelta, stride_dz,
    length, channels, blocks, offset, segments, split, waves, programs,
    N: tl.constexpr, K: tl.constexpr, CK: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, VARLEN: tl.constexpr, HAS_DLAST: tl.constexpr, GRAD_A: tl.constexpr,
    GRAD_D: tl.constexpr, GRAD_BIAS: tl.constexpr, GRAD_H0: tl.constexpr, MASK_D: tl.constexpr,
):  # fmt: skip
    """All gradients of a segment. Of dB and dC each program writes its 32 channels' share: dBC (T, programs, 2·N)."""
    if place(waves) >= programs:
        return
    block, sequence, segment, first, tokens = program_of(
        cu_seqlens, length, blocks, offset, segments, split, waves, VARLEN
    )
    lane = tl.arange(0, 32)
    d, d_ok, tile, a, bias_d, limit = channels_of(
        A, bias, lengths, block, sequence, segment, split, channels, N, HAS_BIAS, HAS_LENGTHS, MASK_D
    )
    skip = 0.0
    if HAS_D:
        skip = load(D + d, d_ok, MASK_D)
    slot = ((sequence * segments + segment) * blocks + block) * (N * 32)
    program = place(waves).to(tl.int64)  # in this launch, whose sums and scratch memory are its own
    dh = tl.zeros([N // 4, 4, 32], tl.float32)
    if HAS_DLAST:
        dh += tl.load(dlast + slot + tile)
    sum_A = tl.zeros([N // 4, 4, 32], tl.float32)
    sum_D = tl.zeros([32], tl.float32)
    sum_bias = tl.zeros([32], tl.float32)
    checkpoint = first_checkpoint(sequence, segment, first, length, split, CK, VARLEN)
    row = first + segment * split
    # The state before each group of K tokens, and behind those before each token that is left over.
    kept = scratch + program * ((CK // K + K - 1) * N * 32) + tile
    rows, distance = row_sectors(
        u, delta, dy, z, stride_u, stride_delta, stride_dy, stride_z, block, channels, K, True, HAS_Z, MASK_D
    )
    states = state_sectors(B, C, K, N)
    kept_sectors = scratch.to(tl.int64) + (program * ((CK // K + K - 1) * N * 32) + lane * (N // 4 * 4)) * 4
    chunks = tl.cdiv(tokens, CK)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        begin = chunk * CK
        here = row + begin
        u_c = u + here * stride_u
        delta_c = delta + here * stride_delta
        z_c = z + here * stride_z
        dy_c = dy + here * stride_dy
        du_c = du + here * stride_du
        ddelta_c = ddelta + here * stride_ddelta
        dz_c = dz + here * stride_dz
        B_c = B + here * N
        C_c = C + here * N
        resets_c = resets + here
        dBC_c = dBC + (here * blocks + block) * (2 * N)
        steps = tl.minimum(CK, tokens - begin)
        whole = steps // K * K
        h = tl.load(checkpoints + ((checkpoint + chunk) * blocks + block) * (N * 32) + tile)
        some = d_ok & (whole > 0)
        xs, raws = _pairs(u_c, delta_c, stride_u, stride_delta, d, some, K, True)
        bs, cs = state_pairs(B_c, C_c, whole > 0, K, N, True)
        for t in range(0, whole, K):
            tl.store(kept + t // K * (N * 32), h)
            ahead = tl.minimum(t + K, whole - K)
            next_xs, next_raws = _pairs(
                u_c + ahead * stride_u, delta_c + ahead * stride_delta, stride_u, stride_delta, d, d_ok, K, MASK_D
            )
            next_bs, next_cs = state_pairs(B_c + ahead * N, C_c, True, K, N, False)
            for k in tl.static_range(K):
                dd, slope = step_size(raws[k].to(tl.float32) + bias_d, begin + t + k, limit, HAS_LENGTHS)
                h = advance(h, dd, xs[k].to(tl.float32), bs[k], a, penalty(resets_c, t + k, HAS_RESETS))
            xs, raws, bs = next_xs, next_raws, next_bs
        for t in range(whole, steps):
            tl.store(kept + (whole // K + t - whole) * (N * 32), h)
            x = load(u_c + t * stride_u + d, d_ok, MASK_D).to(tl.float32)
            raw = load(delta_c + t * stride_delta + d, d_ok, MASK_D).to(tl.float32)
            dd, slope = step_size(raw + bias_d, begin + t, limit, HAS_LENGTHS)
            h = advance(h, dd, x, load_states(B_c + t * N, N), a, penalty(resets_c, t, HAS_RESETS))
        # The same threads read what they wrote; the barrier keeps this true for any layout that Triton may choose.
        tl.debug_barrier()
        for i in range(0, steps - whole):
            t = steps - 1 - i
            h = tl.load(kept + (whole // K + t - whole) * (N * 32))
            x = load(u_c + t * stride_u + d, d_ok, MASK_D).to(tl.float32)
            raw = load(delta_c + t * stride_delta + d, d_ok, MASK_D).to(tl.float32)
            g = load(dy_c + t * stride_dy + d, d_ok, MASK_D).to(tl.float32)
            gate = g
            if HAS_Z:
                gate = load(z_c + t * stride_z + d, d_ok, MASK_D).to(tl.float32)
            dd, slope = step_size(raw + bias_d, begin + t, limit, HAS_LENGTHS)
            dh, sum_A, d_raw, d_skip = _step_back(
                h, dh, sum_A, a, skip, x, dd, slope, g, gate, load_states(B_c + t * N, N), load_states(C_c + t * N, N),
                t, d, d_ok, resets_c, du_c, ddelta_c,
                dz_c, dBC_c, stride_du, stride_ddelta, stride_dz, blocks, N, HAS_Z, HAS_RESETS, GRAD_A,
            )  # fmt: skip
            sum_bias += d_raw
            sum_D += d_skip
        for i in range(0, whole, K):
            t = whole - K - i
            # The group before this one, which is next: see `prefetch`.
            ahead = tl.maximum(t - K, 0)
            prefetch(rows + (here + ahead) * distance)
            prefetch(states + (here + ahead) * (N * 4))
            prefetch(kept_sectors + ahead // K * (N * 32 * 4))
            h = tl.load(kept + t // K * (N * 32))
            xs, raws = _pairs(
                u_c + t * stride_u, delta_c + t * stride_delta, stride_u, stride_delta, d, d_ok, K, MASK_D
            )
            gs, gates = _pairs(dy_c + t * stride_dy, z_c + t * stride_z, stride_dy, stride_z, d, d_ok, K, MASK_D)
            bs, cs = state_pairs(B_c + t * N, C_c + t * N, True, K, N, False)
            before, dds, slopes = (h,), (), ()
            for k in tl.static_range(K):
                dd, slope = step_size(raws[k].to(tl.float32) + bias_d, begin + t + k, limit, HAS_LENGTHS)
                dds = dds + (dd,)
                slopes = slopes + (slope,)
                if k < K - 1:
                    h = advance(h, dd, xs[k].to(tl.float32), bs[k], a, penalty(resets_c, t + k, HAS_RESETS))
                    before = before + (h,)
            for j in tl.static_range(K):
                dh, sum_A, d_raw, d_skip = _step_back(
                    before[K - 1 - j], dh, sum_A, a, skip, xs[K - 1 - j].to(tl.float32), dds[K - 1 - j],
                    slopes[K - 1 - j],
                    gs[K - 1 - j].to(tl.float32), gates[K - 1 - j].to(tl.float32), bs[K - 1 - j], cs[K - 1 - j],
                    t + K - 1 - j, d, d_ok, resets_c, du_c, ddelta_c, dz_c, dBC_c,
                    stride_du, stride_ddelta, stride_dz, blocks, N, HAS_Z, HAS_RESETS, GRAD_A,
                )  # fmt: skip
                sum_bias += d_raw
                sum_D += d_skip
        tl.debug_barrier()
    if GRAD_A:
        tl.store(dA + program * (N * 32) + tile, sum_A)
    if GRAD_D:
        tl.store(dD + program * 32 + lane, sum_D)
    if GRAD_BIAS:
        tl.store(dbias + program * 32 + lane, sum_bias)
    if GRAD_H0:
        tl.store(dh0 + slot + tile, dh)


@triton.jit
def _pairs(first, second, stride_first, stride_second, d, d_ok, K: tl.constexpr, MASK_D: tl.constexpr):
    """K tokens of two tensors, as tuples."""
    firsts, seconds = (), ()
    for k in tl.static_range(K):
        firsts = firsts + (load(first + k * stride_first + d, d_ok, MASK_D),)
        seconds = seconds + (load(second + k * stride_second + d, d_ok, MASK_D),)
    return firsts, seconds


@triton.jit
def _step_back(
    h, dh, sum_A, a, skip, x, dd, slope, g, gate, b, c, t, d, d_ok, resets, du, ddelta, dz, dBC,
    stride_du, stride_ddelta, stride_dz, blocks,
    N: tl.constexpr, HAS_Z: tl.constexpr, HAS_RESETS: tl.constexpr, GRAD_A: tl.constexpr,
):  # fmt: skip
    """Gradients of one token from the state h before it and dh, the gradient of the state after it.

    Returns the gradient of the state before it, the sum for A, and the gradients of delta + bias and of D.
    """
    w = spread(dd * x)
    spread_dd = spread(dd)
    decay = tl.exp2(spread_dd * a + penalty(resets, t, HAS_RESETS))
    carried = decay * h
    after = carried + w * b
    if HAS_Z:
        s = sigmoid(gate)
        y = over_states(after * c) + skip * x
        d_gate = g * y * s * (1.0 + gate * (1.0 - s))
        tl.store(dz + t * stride_dz + d, d_gate.to(dz.dtype.element_ty), mask=d_ok)
        g *= gate * s
    spread_g = spread(g)
    dh += spread_g * c
    store_sums(dBC + t * blocks * (2 * N), dh * w, after * spread_g, N)
    d_exponent = dh * carried
    if GRAD_A:
        sum_A += d_exponent * spread_dd
    from_input = over_states(dh * b)
    d_raw = (over_states(d_exponent * a) * LN2 + from_input * x) * slope
    tl.store(ddelta + t * stride_ddelta + d, d_raw.to(ddelta.dtype.element_ty), mask=d_ok)
    tl.store(du + t * stride_du + d, (from_input * dd + skip * g).to(du.dtype.element_ty), mask=d_ok)
    return dh * decay, sum_A, d_raw, g * x
