"""Mamba-2's scan forward, see `ssd_chunks`.

`states` walks through the chunks of a sequence, `outputs` takes every chunk by itself, several heads of a group one
after the other, which share B and C.
"""
# mypy: ignore-errors
# (Triton's language shares Python's syntax, not its types.)

from __future__ import annotations

import triton
import triton.language as tl

from .ssd_chunks import (
    VARYING,
    decay_between,
    heads_of,
    load_tile,
    slot_of_sequence,
    state_tile,
    store_tile,
    tokens_of,
)
from .ssd_segments import segment_bounds


@triton.jit
def initial_at(index, sequence, INDEXED: tl.constexpr):
    """Which of the initial states is a sequence's."""
    if INDEXED:
        return tl.load(index + sequence)
    else:
        return sequence.to(tl.int64)


@triton.jit
def place_of(slot, sequence, DIRECT: tl.constexpr):
    """Where in h the state before a slot is. DIRECT: first chunks, of which each sequence has one, have no place."""
    if DIRECT:
        return slot - sequence - 1
    else:
        return slot


@triton.jit(do_not_specialize=VARYING)
def states(
    x, B, step, out, through, initial, index, cu_seqlens, h, final, decays,
    length, chunks, heads, group_heads, segments, span, x_row, x_token, x_head, b_row, b_token, b_group,
    HAS_INITIAL: tl.constexpr, INDEXED: tl.constexpr, DIRECT: tl.constexpr, WITH_FINAL: tl.constexpr,
    SEGMENTED: tl.constexpr, KEPT: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """h before each chunk of a sequence and head, and after the last one; P and N are tiles of the state.

    DIRECT: not before the first chunk, where `outputs` takes it from where the sequence starts; h then has no place
    for it, see `place_of`. SEGMENTED: of segments, as if each were a sequence. Not KEPT: only `final`, and what is left
    of a state behind all the chunks, in `decays`.
    """
    sequence, head, p, n, at, inside = state_tile(heads, HEAD_SIZE, STATE_SIZE, P, N)
    row, start, stop, slot = segment_bounds(sequence, cu_seqlens, length, chunks, segments, span, SEGMENTED, PACKED, Q)
    x += row * x_row + head * x_head
    B += row * b_row + (head // group_heads) * b_group
    size = HEAD_SIZE * STATE_SIZE
    state = tl.zeros([P, N], tl.float32)
    count = tl.cdiv(stop - start, Q)
    # The chunks to go past. Of the last one the state after it is no one's without WITH_FINAL; to leave it out takes
    # registers, and pays where it is the only one.
    past = count
    if DIRECT and not WITH_FINAL:
        past = count - 1
    if HAS_INITIAL:
        wanted = inside
        if DIRECT and not WITH_FINAL:
            wanted = inside & (count > 1)
        before = initial_at(index, sequence, INDEXED) * heads + head
        state += tl.load(initial + before * size + at, mask=wanted, other=0.0)
    left = 1.0
    for i in range(past):
        q, t, here, real = tokens_of(start + i * Q, stop, Q)
        mine = (slot + i) * heads + head
        wanted = inside
        if DIRECT:
            wanted = inside & (i > 0)
        if KEPT:
            place = place_of(slot + i, sequence, DIRECT) * heads + head
            tl.store(h + place * size + at, state.to(h.dtype.element_ty), mask=wanted)
        kept = tl.load(through + mine)
        left *= kept
        weights = tl.load(step + mine * Q + q) * tl.load(out + mine * Q + q)
        values = load_tile(x + here * x_token, q, x_token, real, p, HEAD_SIZE).to(tl.float32) * weights[:, None]
        keys = load_tile(B + here * b_token, q, b_token, real, n, STATE_SIZE)
        state = tl.dot(tl.trans(values.to(DOT)), keys.to(DOT), acc=state * kept, input_precision=INPUT)
    if not KEPT:
        tl.store(decays + sequence.to(tl.int64) * heads + head, left)
    if WITH_FINAL:
        tl.store(final + (sequence.to(tl.int64) * heads + head) * size + at, state, mask=inside)
    elif DIRECT:
        wanted = inside & (past > 0)
        place = place_of(slot + past, sequence, DIRECT) * heads + head
        tl.store(h + place * size + at, state.to(h.dtype.element_ty), mask=wanted)


@triton.jit
def outputs_of_heads(
    x, B, C, D, step, s, into, documents, state, y, slot, begin, end, heads, q, here, real,
    x_token, x_head, b_token, c_token,
    FROM_STATE: tl.constexpr, HAS_D: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """y of a chunk's heads `begin` to `end`; `state` is that of all its heads before it."""
    p, n = tl.arange(0, P), tl.arange(0, N)
    in_head = p < HEAD_SIZE
    queries = load_tile(C, q, c_token, real, n, STATE_SIZE).to(DOT)
    TILES: tl.constexpr = (STATE_SIZE + N - 1) // N
    scores = tl.zeros([Q, Q], tl.float32)
    for k in range(TILES):
        if TILES > 1:
            queries = load_tile(C, q, c_token, real, k * N + n, STATE_SIZE).to(DOT)
        keys = load_tile(B, q, b_token, real, k * N + n, STATE_SIZE).to(DOT)
        scores = tl.dot(queries, tl.trans(keys), acc=scores, input_precision=INPUT)
    for head in range(begin, end):
        mine = slot.to(tl.int64) * heads + head
        sums = tl.zeros([Q, P], tl.float32)
        if FROM_STATE:
            for k in range(TILES):
                if TILES > 1:
                    queries = load_tile(C, q, c_token, real, k * N + n, STATE_SIZE).to(DOT)
                columns = state + head * HEAD_SIZE * STATE_SIZE
                columns = load_tile(columns, p, STATE_SIZE, in_head, k * N + n, STATE_SIZE).to(DOT)
                sums = tl.dot(queries, tl.trans(columns), acc=sums, input_precision=INPUT)
            sums *= tl.load(into + mine * Q + q)[:, None]
        weights = scores * decay_between(s, mine, documents, slot, HAS_SEQ_IDX, Q, False)
        weights *= tl.load(step + mine * Q + q)[None, :]
        values = load_tile(x + head * x_head, q, x_token, real, p, HEAD_SIZE)
        sums = tl.dot(weights.to(DOT), values.to(DOT), acc=sums, input_precision=INPUT)
        if HAS_D:
            sums += values.to(tl.float32) * tl.load(D + head)
        store_tile(y + head * HEAD_SIZE, q, heads * HEAD_SIZE, real, p, in_head, sums)


@triton.jit
def outputs_of_first_chunk(
    x, B, C, D, step, s, into, documents, initial, index, sequence, y, slot, begin, end, heads, q, here, real,
    x_token, x_head, b_token, c_token,
    HAS_INITIAL: tl.constexpr, INDEXED: tl.constexpr,
    HAS_D: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """`outputs_of_heads` from where the sequence starts."""
    state = initial
    if HAS_INITIAL:
        state = initial + initial_at(index, sequence, INDEXED) * heads * HEAD_SIZE * STATE_SIZE
    outputs_of_heads(
        x, B, C, D, step, s, into, documents, state, y, slot, begin, end, heads, q, here, real,
        x_token, x_head, b_token, c_token,
        HAS_INITIAL, HAS_D, HAS_SEQ_IDX, DOT, INPUT, Q, P, N, HEAD_SIZE, STATE_SIZE,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def outputs(
    x, B, C, D, step, s, into, documents, initial, index, cu_seqlens, table, h, y,
    length, chunks, heads, group_heads, block_heads, blocks,
    x_row, x_token, x_head, b_row, b_token, b_group, c_row, c_token, c_group,
    HAS_D: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, HAS_INITIAL: tl.constexpr, INDEXED: tl.constexpr,
    DIRECT: tl.constexpr, ONE_CHUNK: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """y of one chunk and block_heads heads of one group; N is one of TILES tiles of the state's columns.

    DIRECT: the state before the first chunk of a sequence is read where it starts from, in float32, not from `h`.
    ONE_CHUNK: DIRECT, and no sequence has another chunk.
    """
    slot, group, _, begin, end = heads_of(tl.program_id(0), heads, group_heads, block_heads, blocks)
    row, first, stop, sequence, chunk = slot_of_sequence(slot, cu_seqlens, table, length, chunks, PACKED, Q)
    if first < stop:
        q, t, here, real = tokens_of(first, stop, Q)
        B += row * b_row + here * b_token + group * b_group
        C += row * c_row + here * c_token + group * c_group
        x += row * x_row + here * x_token
        y += (row * length + here) * heads * HEAD_SIZE
        if ONE_CHUNK:
            outputs_of_first_chunk(
                x, B, C, D, step, s, into, documents, initial, index, sequence, y, slot, begin, end, heads, q, here,
                real, x_token, x_head, b_token, c_token, HAS_INITIAL, INDEXED,
                HAS_D, HAS_SEQ_IDX, DOT, INPUT, Q, P, N, HEAD_SIZE, STATE_SIZE,
            )  # fmt: skip
        else:
            state = h + place_of(slot, sequence, DIRECT).to(tl.int64) * heads * HEAD_SIZE * STATE_SIZE
            if DIRECT and chunk == 0:
                outputs_of_first_chunk(
                    x, B, C, D, step, s, into, documents, initial, index, sequence, y, slot, begin, end, heads, q, here,
                    real, x_token, x_head, b_token, c_token, HAS_INITIAL, INDEXED,
                    HAS_D, HAS_SEQ_IDX, DOT, INPUT, Q, P, N, HEAD_SIZE, STATE_SIZE,
                )  # fmt: skip
            else:
                outputs_of_heads(
                    x, B, C, D, step, s, into, documents, state, y, slot, begin, end, heads, q, here, real,
                    x_token, x_head, b_token, c_token,
                    True, HAS_D, HAS_SEQ_IDX, DOT, INPUT, Q, P, N, HEAD_SIZE, STATE_SIZE,
                )  # fmt: skip
