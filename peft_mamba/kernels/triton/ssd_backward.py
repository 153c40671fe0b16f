"""Mamba-2's scan backward, see `ssd_chunks`.

`state_gradients` walks through the chunks of a sequence from the last to the first. `value_gradients` and
`key_gradients` take every chunk by itself, several heads of a group one after the other, which share B and C.
`step_gradients` puts together the gradients of dt and A.
"""
# mypy: ignore-errors
# (Triton's language shares Python's syntax, not its types.)

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import finished
from .ssd_chunks import (
    VARYING,
    decay_between,
    heads_of,
    load_tile,
    slot_bounds,
    state_tile,
    store_tile,
    tokens_of,
)
from .ssd_segments import segment_bounds


@triton.jit(do_not_specialize=VARYING)
def state_gradients(
    dy, C, into, through, dfinal, cu_seqlens, g, dinitial,
    length, chunks, heads, group_heads, segments, span, y_row, y_token, y_head, c_row, c_token, c_group,
    HAS_FINAL: tl.constexpr, WITH_INITIAL: tl.constexpr, SEGMENTED: tl.constexpr, KEPT: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each chunk, and of the one before the first. SEGMENTED: of segments, as if each
    were a sequence. Not KEPT: only the one before the first."""
    sequence, head, p, n, at, inside = state_tile(heads, HEAD_SIZE, STATE_SIZE, P, N)
    row, start, stop, slot = segment_bounds(sequence, cu_seqlens, length, chunks, segments, span, SEGMENTED, PACKED, Q)
    dy += row * y_row + head * y_head
    C += row * c_row + (head // group_heads) * c_group
    size = HEAD_SIZE * STATE_SIZE
    gradient = tl.zeros([P, N], tl.float32)
    if HAS_FINAL:
        gradient += tl.load(dfinal + (sequence.to(tl.int64) * heads + head) * size + at, mask=inside, other=0.0)
    count = tl.cdiv(stop - start, Q)
    for done in range(count):
        i = count - 1 - done
        q, t, here, real = tokens_of(start + i * Q, stop, Q)
        mine = (slot + i) * heads + head
        if KEPT:
            tl.store(g + mine * size + at, gradient.to(g.dtype.element_ty), mask=inside)
        kept = tl.load(through + mine)
        weights = tl.load(into + mine * Q + q)
        values = load_tile(dy + here * y_token, q, y_token, real, p, HEAD_SIZE).to(tl.float32) * weights[:, None]
        queries = load_tile(C + here * c_token, q, c_token, real, n, STATE_SIZE)
        gradient = tl.dot(tl.trans(values.to(DOT)), queries.to(DOT), acc=gradient * kept, input_precision=INPUT)
    if WITH_INITIAL:
        tl.store(dinitial + (sequence.to(tl.int64) * heads + head) * size + at, gradient, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def value_gradients(
    x, B, C, D, step, s, out, documents, cu_seqlens, table, g, dy, dx, shared, direct, within, dD,
    length, chunks, heads, group_heads, block_heads, blocks,
    x_row, x_token, x_head, b_row, b_token, b_group, c_row, c_token, c_group, y_row, y_token, y_head,
    HAS_D: tl.constexpr, WITH_D: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, INPUT: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """dx of one chunk and block_heads heads of one group, and what the chunk adds to dD. For `key_gradients`: `shared`,
    the gradient of B_r·C_t at [r, t], of all these heads. For `step_gradients`, of other tokens of the chunk: `direct`,
    what dt_t gets as the factor of x_t, and of itself too, and `within`, what s_t gets, less what they get out of t."""
    slot, group, _, begin, end = heads_of(tl.program_id(0), heads, group_heads, block_heads, blocks)
    row, first, stop = slot_bounds(slot, cu_seqlens, table, length, chunks, PACKED, Q)
    if first < stop:
        q, t, here, real = tokens_of(first, stop, Q)
        p, n = tl.arange(0, P), tl.arange(0, N)
        in_head = p < HEAD_SIZE
        B += row * b_row + here * b_token + group * b_group
        C += row * c_row + here * c_token + group * c_group
        x += row * x_row + here * x_token
        dy += row * y_row + here * y_token
        dx += (row * length + here) * heads * HEAD_SIZE
        keys = load_tile(B, q, b_token, real, n, STATE_SIZE).to(DOT)
        TILES: tl.constexpr = (STATE_SIZE + N - 1) // N
        scores = tl.zeros([Q, Q], tl.float32)  # B_r·C_t at [r, t]
        for k in range(TILES):
            if TILES > 1:
                keys = load_tile(B, q, b_token, real, k * N + n, STATE_SIZE).to(DOT)
            queries = load_tile(C, q, c_token, real, k * N + n, STATE_SIZE).to(DOT)
            scores = tl.dot(keys, tl.trans(queries), acc=scores, input_precision=INPUT)
        summed = tl.zeros([Q, Q], tl.float32)
        for head in range(begin, end):
            mine = slot.to(tl.int64) * heads + head
            gradient = g + mine * HEAD_SIZE * STATE_SIZE
            values = load_tile(x + head * x_head, q, x_token, real, p, HEAD_SIZE)
            douts = load_tile(dy + head * y_head, q, y_token, real, p, HEAD_SIZE).to(DOT)
            # All loads at once: what is loaded after a barrier is waited for.
            if TILES == 1:
                columns = load_tile(gradient, p, STATE_SIZE, in_head, n, STATE_SIZE).to(DOT)
            sizes = tl.load(step + mine * Q + q)
            left = tl.load(out + mine * Q + q)
            if HAS_D:
                skip = tl.load(D + head)
            decay = decay_between(s, mine, documents, slot, HAS_SEQ_IDX, Q, True)
            weights = (scores * decay).to(DOT)
            pairs = tl.dot(values.to(DOT), tl.trans(douts), input_precision=INPUT) * decay
            summed += pairs * sizes[:, None]
            pairs *= scores
            tl.store(direct + mine * Q + q, tl.sum(pairs, 1))
            # In float32, and without a token's pair with itself: the sums are of what largely cancels out.
            pairs = tl.where(q[:, None] < q[None, :], pairs, 0.0) * sizes[:, None]
            tl.store(within + mine * Q + q, tl.sum(pairs, 0) - tl.sum(pairs, 1))
            after = tl.zeros([Q, P], tl.float32)  # g B_t
            for k in range(TILES):
                if TILES > 1:
                    keys = load_tile(B, q, b_token, real, k * N + n, STATE_SIZE).to(DOT)
                    columns = load_tile(gradient, p, STATE_SIZE, in_head, k * N + n, STATE_SIZE).to(DOT)
                after = tl.dot(keys, tl.trans(columns), acc=after, input_precision=INPUT)
            after *= left[:, None]
            dvalues = tl.dot(weights, douts, acc=after, input_precision=INPUT)
            dvalues *= sizes[:, None]
            if HAS_D:
                dvalues += douts.to(tl.float32) * skip
            if WITH_D:
                tl.store(dD + mine, tl.sum(douts.to(tl.float32) * values.to(tl.float32)))
            store_tile(dx + head * HEAD_SIZE, q, heads * HEAD_SIZE, real, p, in_head, dvalues)
        store_tile(shared + tl.program_id(0).to(tl.int64) * Q * Q, q, Q, q < Q, q, q < Q, summed)
    elif WITH_D:
        for head in range(begin, end):
            tl.store(dD + slot.to(tl.int64) * heads + head, 0.0)


@triton.jit
def through_state(
    values, keys, state, opposite, factors, step, passed, both,
    slot, part, heads, begin, end, q, real, n, token, head_stride,
    BACK: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """What comes through the state of the heads from begin to end: for dC, values are dy, keys C, and the state is the
    one before; with BACK for dB, of x, B and the gradient of the state after."""
    p = tl.arange(0, P)
    total = tl.zeros([Q, N], tl.float32)
    for head in range(begin, end):
        mine = slot.to(tl.int64) * heads + head
        at = mine * HEAD_SIZE * STATE_SIZE
        own = load_tile(values + head * head_stride, q, token, real, p, HEAD_SIZE).to(tl.float32)
        columns = load_tile(state + at, p, STATE_SIZE, p < HEAD_SIZE, n, STATE_SIZE)
        if BACK:
            others = load_tile(opposite + at, p, STATE_SIZE, p < HEAD_SIZE, n, STATE_SIZE)
            tl.store(both + part + mine, tl.sum(columns.to(tl.float32) * others.to(tl.float32)))
        factor = tl.load(factors + mine * Q + q)
        read = tl.dot(keys, tl.trans(columns.to(DOT)), input_precision=INPUT)
        tl.store(passed + (part + mine) * Q + q, tl.sum(read * own, 1) * factor)
        if BACK:
            factor *= tl.load(step + mine * Q + q)
        total = finished(tl.dot((own * factor[:, None]).to(DOT), columns.to(DOT), acc=total, input_precision=INPUT))
    return total


@triton.jit(do_not_specialize=VARYING)
def key_gradients(
    x, B, C, step, into, out, cu_seqlens, table, h, g, dy, shared, partial, reading, leaving, both,
    batch, slots, length, chunks, heads, group_heads, block_heads, blocks,
    x_row, x_token, x_head, b_row, b_token, b_group, c_row, c_token, c_group, y_row, y_token, y_head,
    PACKED: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """What block_heads heads of one group add to dC or dB of one chunk in a tile of N columns; one program after the
    other, as both read h. For `step_gradients`, of these columns and every head: `reading`, what s_t gets out of the
    state before, `leaving`, what dt_t gets out of the one after, and `both`, the product of h and g."""
    back, program = tl.program_id(0) % 2, tl.program_id(0) // 2
    tiles = tl.cdiv(STATE_SIZE, N)
    tile, program = program % tiles, program // tiles
    slot, group, block, begin, end = heads_of(program, heads, group_heads, block_heads, blocks)
    row, first, stop = slot_bounds(slot, cu_seqlens, table, length, chunks, PACKED, Q)
    if first < stop:
        q, _, here, real = tokens_of(first, stop, Q)
        n = tile * N + tl.arange(0, N)
        x += row * x_row + here * x_token
        dy += row * y_row + here * y_token
        B += row * b_row + here * b_token + group * b_group
        C += row * c_row + here * c_token + group * c_group
        shared += program.to(tl.int64) * Q * Q
        part = tile.to(tl.int64) * slots * heads
        if back == 0:
            queries = load_tile(C, q, c_token, real, n, STATE_SIZE).to(DOT)
            total = through_state(
                dy, queries, h, g, into, step, reading, both,
                slot, part, heads, begin, end, q, real, n, y_token, y_head,
                False, DOT, INPUT, Q, P, N, HEAD_SIZE, STATE_SIZE,
            )  # fmt: skip
            pairs = load_tile(shared, q, Q, q < Q, q, Q).to(DOT)
            keys = load_tile(B, q, b_token, real, n, STATE_SIZE).to(DOT)
            total = tl.dot(tl.trans(pairs), keys, acc=total, input_precision=INPUT)
        else:
            keys = load_tile(B, q, b_token, real, n, STATE_SIZE).to(DOT)
            total = through_state(
                x, keys, g, h, out, step, leaving, both,
                slot, part, heads, begin, end, q, real, n, x_token, x_head,
                True, DOT, INPUT, Q, P, N, HEAD_SIZE, STATE_SIZE,
            )  # fmt: skip
            pairs = load_tile(shared, q, Q, q < Q, q, Q).to(DOT)
            queries = load_tile(C, q, c_token, real, n, STATE_SIZE).to(DOT)
            total = tl.dot(pairs, queries, acc=total, input_precision=INPUT)
        groups = heads // group_heads
        partial += ((((block * 2 + back) * batch + row) * length + here) * groups + group) * STATE_SIZE
        store_tile(partial, q, groups * STATE_SIZE, real, n, n < STATE_SIZE, total)


@triton.jit(do_not_specialize=VARYING)
def step_gradients(
    A, step, through, lengths, cu_seqlens, table, direct, within, reading, leaving, both, ddt, dA,
    slots, length, chunks, heads, tiles,
    HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr, Q: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """ddt of one chunk and H heads, and what the chunk adds to dA."""
    slot = tl.program_id(0)
    head = tl.program_id(1) * H + tl.arange(0, H)
    there = head < heads
    row, first, stop = slot_bounds(slot, cu_seqlens, table, length, chunks, PACKED, Q)
    mine = slot.to(tl.int64) * heads + head
    da = tl.zeros([H], tl.float32)
    if first < stop:
        q, t, here, real = tokens_of(first, stop, Q)
        at, inside = mine[None, :] * Q + q[:, None], there[None, :]
        exponent = tl.load(within + at, mask=inside, other=0.0)
        kept = tl.zeros([H], tl.float32)
        left = tl.zeros([Q, H], tl.float32)
        for k in range(tiles):
            part = slots.to(tl.int64) * heads * k
            exponent += tl.load(reading + part * Q + at, mask=inside, other=0.0)
            left += tl.load(leaving + part * Q + at, mask=inside, other=0.0)
            kept += tl.load(both + part + mine, mask=there, other=0.0)
        kept *= tl.load(through + mine, mask=there, other=0.0)
        sizes = tl.load(step + at, mask=inside, other=0.0)
        factors = tl.load(direct + at, mask=inside, other=0.0) + left
        left *= sizes
        # a_t is in the exponents of all that passes token t: s_t and later, what leaves earlier, and the state.
        gradient = tl.cumsum(exponent, 0, reverse=True) + (tl.cumsum(left, 0) - left) + kept[None, :]
        da = tl.sum(gradient * sizes, 0)
        gradient *= tl.load(A + head, mask=there, other=0.0)[None, :]
        gradient += factors
        if HAS_LENGTHS:
            gradient = tl.where((t < tl.load(lengths + row))[:, None], gradient, 0.0)
        store_tile(ddt + (row * length + here) * heads, q, heads, real, head, there, gradient)
    tl.store(dA + mine, da, mask=there)
