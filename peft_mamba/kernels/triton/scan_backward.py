"""The selective scan backward.

A stretch of CK tokens starts from its checkpoint: a pass forward keeps the state before each group of K tokens in
scratch memory, then the groups are taken from the last to the first, each recomputed in registers.
"""

import triton
import triton.language as tl

from .elementwise import LN2, sigmoid
from .scan_memory import (
    keep,
    keep_shared,
    load,
    load_kept,
    load_shared,
    prefetch,
    row_sectors,
    scratch_offsets,
    shared_memory,
    state_sectors,
)
from .scan_programs import channels_of, first_checkpoint, kernel, penalty, place, program_of, step_size
from .scan_ring import (
    DELTA,
    DY,
    U,
    Z,
    begin_copies,
    copy_state,
    fetch_rows,
    fetch_state,
    rows_of,
    states_of,
    take_group,
)
from .scan_tiles import (
    advance,
    decay_rates,
    exchange,
    load_tiles,
    no_state,
    own,
    state_pairs,
    state_tiles,
    states_at,
    store_sums,
    store_tiles,
    sums_at,
)


@kernel
def scan_backward(
    u, delta, A, B, C, D, z, bias, resets, lengths, cu_seqlens, checkpoints, dy, dlast, scratch,
    du, ddelta, dz, dBC, dA, dD, dbias, dh0,
    stride_u, stride_delta, stride_z, stride_dy, stride_du, stride_ddelta, stride_dz,
    length, channels, blocks, offset, segments, split, waves, programs,
    STATES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, CK: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, VARLEN: tl.constexpr, HAS_DLAST: tl.constexpr, GRAD_A: tl.constexpr,
    GRAD_D: tl.constexpr, GRAD_BIAS: tl.constexpr, GRAD_H0: tl.constexpr, MASK_D: tl.constexpr, MASKED: tl.constexpr,
    SHARED: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """All gradients of a segment. Of dB and dC each program writes its 32 channels' share: dBC (T, programs, 2·N)."""
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
    skip = 0.0
    if HAS_D:
        skip = load(D + d, d_ok, MASK_D)
    size = channels.to(tl.int64) * STATES
    slot = (sequence * segments + segment) * size
    program = place(waves).to(tl.int64)  # in this launch, whose sums and scratch memory are its own
    dh = no_state(N)
    if HAS_DLAST:
        dh = load_tiles(dlast + slot, tiles, inside, MASKED)
    sum_A = no_state(N)
    sum_D = tl.zeros([32], tl.float32)
    sum_bias = tl.zeros([32], tl.float32)
    checkpoint = first_checkpoint(sequence, segment, first, length, split, CK, VARLEN)
    row = first + segment * split
    tl.static_assert(K == 2, "of a chunk, one token may be left over")
    # The state before each group of K tokens.
    rates = 0
    if SHARED:
        kept = shared_memory(GRAD_A)
        rates = kept + (CK // K - 1) * (N * 128)
        if GRAD_A:
            keep_shared(rates, a, N)
    else:
        kept = scratch + program * (CK // K * N * 32) + scratch_offsets(N)
    # Whole groups are taken from the last to the first; with RING each is copied while the one before it is computed.
    if RING:
        ring, turn, rows, distance, there, states = begin_copies(
            u, delta, dy, z, stride_u, stride_delta, stride_dy, stride_z, B, C, block,
            row + tokens // K * K - K, tokens >= K, K, RING, True, HAS_Z,
        )  # fmt: skip
    else:
        rows, distance = row_sectors(
            u, delta, dy, z, stride_u, stride_delta, stride_dy, stride_z, block, channels, K, True, HAS_Z, MASK_D
        )
    chunks = tl.cdiv(tokens, CK)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        begin = chunk * CK
        here = row + begin
        steps = tl.minimum(CK, tokens - begin)
        whole = steps // K * K
        resets_c = resets + here
        B_c = B + here * N
        C_c = C + here * N
        u_c = u + here * stride_u
        delta_c = delta + here * stride_delta
        z_c = z + here * stride_z
        dy_c = dy + here * stride_dy
        du_c = du + here * stride_du
        ddelta_c = ddelta + here * stride_ddelta
        dz_c = dz + here * stride_dz
        dBC_c = dBC + (here * blocks + block) * (2 * N)
        saved_at = checkpoints + ((checkpoint + chunk) * blocks + block) * (N * 32)
        saved = saved_at + scratch_offsets(N)
        h = load_kept(saved, N)
        # Of the last group only the state before it is needed, unless a token is left over behind it.
        groups = whole if whole < steps else whole - K
        some = d_ok & (whole > 0)
        if SHARED and GRAD_A:
            a = load_shared(rates, 0, N), load_shared(rates, 1, N), load_shared(rates, 2, N), load_shared(rates, 3, N)
        xs, raws = _pairs(u_c, delta_c, stride_u, stride_delta, d, some, K, True)
        bs, cs = state_pairs(B_c + states_at(N), C_c + states_at(N), whole > 0, K, N, True)
        for t in range(0, groups, K):
            if not SHARED:
                keep(kept + t // K * (N * 32), h, N)
            elif t > 0:
                keep_shared(_slot(kept, t // K, N), h, N)
            ahead = tl.minimum(t + K, whole - K)
            next_xs, next_raws = _pairs(
                u_c + ahead * stride_u, delta_c + ahead * stride_delta, stride_u, stride_delta, d, d_ok, K, MASK_D
            )
            next_bs, next_cs = state_pairs(
                B_c + ahead * N + states_at(N), C_c + ahead * N + states_at(N), True, K, N, False
            )
            for k in tl.static_range(K):
                dd, slope = step_size(raws[k].to(tl.float32) + bias_d, begin + t + k, limit, HAS_LENGTHS)
                h = advance(h, dd, xs[k].to(tl.float32), bs[k], a, penalty(resets_c, t + k, HAS_RESETS), N)
            xs, raws, bs = next_xs, next_raws, next_bs
        if whole == steps:
            if SHARED:
                keep_shared(_slot(kept, groups // K, N), h, N)
            else:
                keep(kept + groups // K * (N * 32), h, N)
        if not SHARED:  # there each lane reads what it wrote itself
            tl.debug_barrier()
        if whole < steps:  # one token, and h is the state before it
            dh, sum_A, d_raw, d_skip = _group_back(
                h, dh, sum_A, a, rates, skip, kept, 0,
                u_c, delta_c, B_c, C_c, z_c, dy_c, du_c, ddelta_c, dz_c, dBC_c,
                stride_u, stride_delta, stride_z, stride_dy, stride_du, stride_ddelta, stride_dz, blocks,
                whole, begin, limit, bias_d, resets_c, d, d_ok,
                N, 1, HAS_Z, HAS_RESETS, HAS_LENGTHS, GRAD_A, MASK_D, False, False,
            )  # fmt: skip
            sum_bias += d_raw
            sum_D += d_skip
        if RING:
            # Of the stretch before, what is first read is fetched from DRAM by now.
            if chunk > 0:
                earlier = here - CK
                fetch_state(saved_at - blocks.to(tl.int64) * (N * 32))
                fetch_rows(u + earlier * stride_u, stride_u, block, CK)
                fetch_rows(delta + earlier * stride_delta, stride_delta, block, CK)
            copy_state(_slot(kept, 0, N), saved_at, whole == K)
        else:
            sectors = rows + here * distance
            sectors_BC = state_sectors(B + here * N, C + here * N, K, N)
        for i in range(0, whole, K):
            t = whole - K - i
            group = 0
            # The group that lies in front of this one is next.
            if RING:
                group, turn, rows, states = take_group(
                    ring, turn, rows, distance, there, states, begin + t > 0, K, True, RING
                )
                copy_state(_slot(kept, 0, N), saved_at, t == K)
            else:
                ahead = tl.maximum(t - K, 0)
                prefetch(sectors + ahead * distance)
                prefetch(sectors_BC + ahead * (N * 4))
            if SHARED:
                kept_t = _slot(kept, t // K, N)
                if not RING:
                    if t == 0:
                        keep_shared(kept_t, load_kept(saved, N), N)
            else:
                kept_t = kept
                h = load_kept(kept + t // K * (N * 32), N)
            dh, sum_A, d_raw, d_skip = _group_back(
                h, dh, sum_A, a, rates, skip, kept_t, group,
                u_c, delta_c, B_c, C_c, z_c, dy_c, du_c, ddelta_c, dz_c, dBC_c,
                stride_u, stride_delta, stride_z, stride_dy, stride_du, stride_ddelta, stride_dz, blocks,
                t, begin, limit, bias_d, resets_c, d, d_ok,
                N, K, HAS_Z, HAS_RESETS, HAS_LENGTHS, GRAD_A, MASK_D, SHARED, RING,
            )  # fmt: skip
            sum_bias += d_raw
            sum_D += d_skip
        if not SHARED:
            tl.debug_barrier()
    if GRAD_A:
        store_tiles(dA + program // blocks * size, tiles, inside, sum_A, MASKED)
    if GRAD_D:
        tl.store(dD + program * 32 + lane, sum_D)
    if GRAD_BIAS:
        tl.store(dbias + program * 32 + lane, sum_bias)
    if GRAD_H0:
        store_tiles(dh0 + slot, tiles, inside, dh, MASKED)


@triton.jit
def _slot(kept, group, N: tl.constexpr):
    """Where the state before a group is kept: the first one's, which is the checkpoint, once the third's was read."""
    return kept + tl.where(group == 0, 1, group - 1) * (N * 128)


@triton.jit
def _pairs(first, second, stride_first, stride_second, d, d_ok, K: tl.constexpr, MASK_D: tl.constexpr):
    """K tokens of two tensors, as tuples."""
    firsts, seconds = (), ()
    for k in tl.static_range(K):
        firsts = firsts + (load(first + k * stride_first + d, d_ok, MASK_D),)
        seconds = seconds + (load(second + k * stride_second + d, d_ok, MASK_D),)
    return firsts, seconds


@triton.jit
def _group_back(
    h, dh, sum_A, a, rates, skip, kept, group, u, delta, B, C, z, dy, du, ddelta, dz, shares,
    stride_u, stride_delta, stride_z, stride_dy, stride_du, stride_ddelta, stride_dz, blocks,
    row, begin, limit, bias, resets, d, d_ok,
    N: tl.constexpr, K: tl.constexpr, HAS_Z: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    GRAD_A: tl.constexpr, MASK_D: tl.constexpr, SHARED: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Gradients of K tokens from the state before them, h or what is `kept`, and dh, the gradient of the state after.

    Returns the gradient of the state before them, the sum for A, and what they add to those of the bias and of D.
    """
    if RING:
        xs, raws = rows_of(group, U, u, K, RING), rows_of(group, DELTA, delta, K, RING)
        gs, gates = rows_of(group, DY, dy, K, RING), rows_of(group, Z, z, K, RING)
        bs, cs = states_of(group, K, RING)
    else:
        xs, raws = _pairs(u + row * stride_u, delta + row * stride_delta, stride_u, stride_delta, d, d_ok, K, MASK_D)
        gs, gates = _pairs(dy + row * stride_dy, z + row * stride_z, stride_dy, stride_z, d, d_ok, K, MASK_D)
        bs, cs = state_pairs(B + row * N + states_at(N), C + row * N + states_at(N), True, K, N, False)
    steps, slopes, inputs, outs, for_gates, penalties = (), (), (), (), (), ()
    # Of each token: sums over a lane's states of three quantities, of the tiles so far, and over its channels of two.
    ys, from_inputs, from_decays, for_B, for_C = (), (), (), (), ()
    nothing = tl.zeros([32], tl.float32)
    for k in tl.static_range(K):
        step, slope = step_size(raws[k].to(tl.float32) + bias, begin + row + k, limit, HAS_LENGTHS)
        out = gs[k].to(tl.float32)
        if HAS_Z:
            gate = gates[k].to(tl.float32)
            s = sigmoid(gate)
            for_gates = for_gates + (out * s * (1.0 + gate * (1.0 - s)),)
            out *= gate * s
        steps = steps + (step,)
        slopes = slopes + (slope,)
        inputs = inputs + (step * xs[k].to(tl.float32),)
        outs = outs + (out,)
        penalties = penalties + (penalty(resets, row + k, HAS_RESETS),)
        ys = ys + (nothing,)
        from_inputs = from_inputs + (nothing,)
        from_decays = from_decays + (nothing,)
        for_B = for_B + (tl.zeros([N // 4, 32], tl.float32),)
        for_C = for_C + (tl.zeros([N // 4, 32], tl.float32),)
    # A tile at a time, through all of the tokens and back: what is in between takes a quarter of the registers. From
    # the last tile to the first, so that sums go on to the lane whose tile is next: 3 to 2, 2 to 1, 1 to 0.
    before, sums = (), ()
    for n in tl.static_range(4):
        state = load_shared(kept, 3 - n, N) if SHARED else h[3 - n]
        rate = load_shared(rates, 3 - n, N) if SHARED and GRAD_A else a[3 - n]
        decays, carried, states, inputs_n = (), (), (), ()
        sum_n = sum_A[3 - n]
        for k in tl.static_range(K):
            decays = decays + (tl.exp2(own(steps[k], 3 - n, N) * rate + penalties[k]),)
            carried = carried + (decays[k] * state,)
            inputs_n = inputs_n + (own(inputs[k], 3 - n, N),)
            state = carried[k] + inputs_n[k] * bs[k]
            states = states + (state,)
        gradient = dh[3 - n]
        new_ys, new_inputs, new_decays, new_B, new_C = (), (), (), (), ()
        for j in tl.static_range(K):
            out = own(outs[K - 1 - j], 3 - n, N)
            gradient += out * cs[K - 1 - j]
            d_exponent = gradient * carried[K - 1 - j]
            new_B = (for_B[K - 1 - j] + gradient * inputs_n[K - 1 - j],) + new_B
            new_C = (for_C[K - 1 - j] + states[K - 1 - j] * out,) + new_C
            new_inputs = (_pass_on(from_inputs[K - 1 - j], gradient * bs[K - 1 - j], n, N),) + new_inputs
            new_decays = (_pass_on(from_decays[K - 1 - j], d_exponent * rate, n, N),) + new_decays
            if HAS_Z:
                new_ys = (_pass_on(ys[K - 1 - j], states[K - 1 - j] * cs[K - 1 - j], n, N),) + new_ys
            if GRAD_A:
                sum_n += d_exponent * own(steps[K - 1 - j], 3 - n, N)
            gradient *= decays[K - 1 - j]
        before = (gradient,) + before
        sums = (sum_n,) + sums
        ys, from_inputs, from_decays, for_B, for_C = new_ys, new_inputs, new_decays, new_B, new_C
    sum_bias, sum_D = nothing, nothing
    for k in tl.static_range(K):
        x, out = xs[k].to(tl.float32), outs[k]
        if HAS_Z:
            d_gate = for_gates[k] * (ys[k] + skip * x)
            tl.store(dz + (row + k) * stride_dz + d, d_gate.to(dz.dtype.element_ty), mask=d_ok)
        store_sums(shares + (row + k) * blocks * (2 * N) + sums_at(N), for_B[k], for_C[k], N)
        d_raw = (from_decays[k] * LN2 + from_inputs[k] * x) * slopes[k]
        d_u = from_inputs[k] * steps[k] + skip * out
        tl.store(ddelta + (row + k) * stride_ddelta + d, d_raw.to(ddelta.dtype.element_ty), mask=d_ok)
        tl.store(du + (row + k) * stride_du + d, d_u.to(du.dtype.element_ty), mask=d_ok)
        sum_bias += d_raw
        sum_D += out * x
    return before, sums, sum_bias, sum_D


@triton.jit
def _pass_on(sums, tile, n: tl.constexpr, N: tl.constexpr):
    """Add a tile's sums over its states to those of the tiles before it, which come from the lane that had them."""
    here = tl.sum(tile, 0)
    if n == 0:
        return here
    else:
        # From tile 4 - n of the lane l ^ (4 - n) to tile 3 - n of the lane l ^ (3 - n), for the same channel.
        return here + exchange(sums, (4 - n) ^ (3 - n), N)
