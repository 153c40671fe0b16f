"""The kernels of Mamba-2's scan in the block form of 2405.21060, section 6; `ssd` calls them.

A sequence is cut into chunks of Q tokens. With a_t = dt_t A, s_t its sum within the chunk up to t, and h the state
before the chunk,

    y_t = Σ_{r≤t} exp(s_t - s_r) (C_t·B_r) dt_r x_r + exp(s_t) h C_t + D x_t
    h'  = exp(s_Q) h + Σ_r exp(s_Q - s_r) dt_r x_r B_rᵀ

`states` and `state_gradients` walk through the chunks of a sequence, forwards for h and backwards for its gradient g;
`outputs`, `value_gradients` and `key_gradients` then take every chunk by itself. Where a document starts inside a
chunk, the terms that would cross are left out.

A slot is a chunk's place in the buffers of states. The rows of a batch have `chunks` of them each; sequence s of a
packed row starts at slot cu_seqlens[s] // Q + s, which leaves enough for those before it, and `table` tells whose a
slot is.
"""
# mypy: ignore-errors
# (Triton's language shares Python's syntax, not its types.)

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Differ from batch to batch, or make no faster kernel: none is compiled anew for a multiple of 16 or a 1 among them.
VARYING = ["batch", "length", "chunks", "heads", "group_heads", "block_heads", "blocks"]


@triton.jit
def chunk_table(cu_seqlens, table, Q: tl.constexpr):
    """table[slot] = sequence, for all slots of the sequence program_id(0)."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence)
    stop = tl.load(cu_seqlens + sequence + 1)
    for i in range(tl.cdiv(stop - start, Q)):
        tl.store(table + start // Q + sequence + i, sequence)


@triton.jit
def sequence_bounds(sequence, cu_seqlens, length, chunks, PACKED: tl.constexpr, Q: tl.constexpr):
    """(row, first token, end, first slot) of a sequence."""
    if PACKED:
        start = tl.load(cu_seqlens + sequence)
        stop = tl.load(cu_seqlens + sequence + 1)
        return (sequence * 0).to(tl.int64), start, stop, (start // Q + sequence).to(tl.int64)
    else:
        return sequence.to(tl.int64), sequence * 0, length, sequence.to(tl.int64) * chunks


@triton.jit
def slot_bounds(slot, cu_seqlens, table, length, chunks, PACKED: tl.constexpr, Q: tl.constexpr):
    """(row, first token, end of the sequence) of a slot; an empty one does not end behind its first token."""
    if PACKED:
        sequence = tl.load(table + slot)
        known = sequence >= 0
        begin = tl.load(cu_seqlens + sequence, mask=known, other=0)
        stop = tl.load(cu_seqlens + sequence + 1, mask=known, other=0)
        return (slot * 0).to(tl.int64), begin + (slot - begin // Q - sequence) * Q, stop
    else:
        return (slot // chunks).to(tl.int64), (slot % chunks) * Q, length


@triton.jit
def steps_of(
    dt, A, lengths, seq_idx, row, start, stop, length, heads, head,
    HAS_LENGTHS: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, PRECISE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: step sizes, s_t / ln 2, s_Q / ln 2, which tokens the state before reaches (1 or 0), which
    tokens reach the state after, whether the former reaches the latter, and the documents counted from the chunk on."""
    t = start + tl.arange(0, Q)
    real = t < stop
    if HAS_LENGTHS:
        real = real & (t < tl.load(lengths + row))
    step = tl.load(dt + (row * length + start) * heads + head + tl.arange(0, Q) * heads, mask=real, other=0.0)
    a = step * (tl.load(A + head) * LOG2E)
    if PRECISE:  # of large sums only differences are used
        a = a.to(tl.float64)
    s = tl.cumsum(a, 0)
    total = tl.sum(a, 0)
    document = tl.zeros([Q], tl.int32)
    if HAS_SEQ_IDX:
        here = tl.load(seq_idx + row * length + t, mask=t < stop, other=0)
        before = tl.load(seq_idx + row * length + t - 1, mask=(t < stop) & (t > 0), other=0)
        document = tl.cumsum(((here != before) & (t > 0) & (t < stop)).to(tl.int32), 0)
    last = tl.max(document, 0)
    into = tl.where(document == 0, tl.exp2(s.to(tl.float32)), 0.0)
    out = tl.where(document == last, tl.exp2((total - s).to(tl.float32)), 0.0)
    through = tl.where(last == 0, tl.exp2(total.to(tl.float32)), 0.0)
    return step, s, into, out, through, document


@triton.jit
def decay_between(s, document, HAS_SEQ_IDX: tl.constexpr, Q: tl.constexpr):
    """(Q, Q): exp(s_t - s_r) at [t, r], 0 where r > t or in another document."""
    i = tl.arange(0, Q)
    reached = i[:, None] >= i[None, :]
    if HAS_SEQ_IDX:
        reached = reached & (document[:, None] == document[None, :])
    return tl.exp2(tl.where(reached, (s[:, None] - s[None, :]).to(tl.float32), float("-inf")))


@triton.jit
def load_tile(pointer, rows, row_stride, row_mask, columns, column_count):
    return tl.load(
        pointer + rows[:, None] * row_stride + columns[None, :],
        mask=row_mask[:, None] & (columns < column_count)[None, :],
        other=0.0,
    )


@triton.jit
def store_tile(pointer, rows, row_stride, row_mask, columns, column_mask, values):
    at = (rows * row_stride)[:, None] + columns[None, :]
    tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def tokens_of(first, stop, Q: tl.constexpr):
    """Of a chunk: 0 to Q, its tokens, the first one's number as int64, and which of them there are."""
    q = tl.arange(0, Q)
    t = first + q
    return q, t, first.to(tl.int64), t < stop


@triton.jit
def state_tile(head_size, state_size, P: tl.constexpr, N: tl.constexpr):
    """The tile of a state that is program_id(2)'s: rows, columns, offsets in the state, which elements there are."""
    tiles = tl.cdiv(state_size, N)
    p = (tl.program_id(2) // tiles) * P + tl.arange(0, P)
    n = (tl.program_id(2) % tiles) * N + tl.arange(0, N)
    inside = (p < head_size)[:, None] & (n < state_size)[None, :]
    return p, n, p[:, None] * state_size + n[None, :], inside


@triton.jit(do_not_specialize=VARYING)
def states(
    x, dt, A, B, initial, lengths, seq_idx, cu_seqlens, h, final,
    length, chunks, heads, group_heads, head_size, state_size,
    x_row, x_token, x_head, b_row, b_token, b_group,
    HAS_INITIAL: tl.constexpr, WITH_FINAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr, PACKED: tl.constexpr, PRECISE: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """h before each chunk of a sequence and head, and after the last one; P and N are tiles of the state."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    p, n, at, inside = state_tile(head_size, state_size, P, N)
    q = tl.arange(0, Q)
    row, start, stop, slot = sequence_bounds(sequence, cu_seqlens, length, chunks, PACKED, Q)
    x += row * x_row + head * x_head
    B += row * b_row + (head // group_heads) * b_group
    size = head_size.to(tl.int64) * state_size
    state = tl.zeros([P, N], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + (sequence.to(tl.int64) * heads + head) * size + at, mask=inside, other=0.0)
    for i in range(tl.cdiv(stop - start, Q)):
        first = start + i * Q
        t = first + q
        tl.store(h + ((slot + i) * heads + head) * size + at, state.to(h.dtype.element_ty), mask=inside)
        step, _, _, out, through, _ = steps_of(
            dt, A, lengths, seq_idx, row, first, stop, length, heads, head, HAS_LENGTHS, HAS_SEQ_IDX, PRECISE, Q
        )
        here = first.to(tl.int64)
        values = (
            load_tile(x + here * x_token, q, x_token, t < stop, p, head_size).to(tl.float32) * (step * out)[:, None]
        )
        keys = load_tile(B + here * b_token, q, b_token, t < stop, n, state_size)
        state = tl.dot(tl.trans(values.to(DOT)), keys.to(DOT), acc=state * through, input_precision=INPUT)
    if WITH_FINAL:
        tl.store(final + (sequence.to(tl.int64) * heads + head) * size + at, state, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def state_gradients(
    dy, dt, A, C, dfinal, lengths, seq_idx, cu_seqlens, g, dinitial,
    length, chunks, heads, group_heads, head_size, state_size,
    y_row, y_token, y_head, c_row, c_token, c_group,
    HAS_FINAL: tl.constexpr, WITH_INITIAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SEQ_IDX: tl.constexpr,
    PACKED: tl.constexpr, PRECISE: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each chunk, and of the one before the first."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    p, n, at, inside = state_tile(head_size, state_size, P, N)
    q = tl.arange(0, Q)
    row, start, stop, slot = sequence_bounds(sequence, cu_seqlens, length, chunks, PACKED, Q)
    dy += row * y_row + head * y_head
    C += row * c_row + (head // group_heads) * c_group
    size = head_size.to(tl.int64) * state_size
    gradient = tl.zeros([P, N], tl.float32)
    if HAS_FINAL:
        gradient += tl.load(dfinal + (sequence.to(tl.int64) * heads + head) * size + at, mask=inside, other=0.0)
    count = tl.cdiv(stop - start, Q)
    for step in range(count):
        i = count - 1 - step
        first = start + i * Q
        t = first + q
        tl.store(g + ((slot + i) * heads + head) * size + at, gradient.to(g.dtype.element_ty), mask=inside)
        _, _, into, _, through, _ = steps_of(
            dt, A, lengths, seq_idx, row, first, stop, length, heads, head, HAS_LENGTHS, HAS_SEQ_IDX, PRECISE, Q
        )
        here = first.to(tl.int64)
        values = load_tile(dy + here * y_token, q, y_token, t < stop, p, head_size).to(tl.float32) * into[:, None]
        queries = load_tile(C + here * c_token, q, c_token, t < stop, n, state_size)
        gradient = tl.dot(tl.trans(values.to(DOT)), queries.to(DOT), acc=gradient * through, input_precision=INPUT)
    if WITH_INITIAL:
        tl.store(dinitial + (sequence.to(tl.int64) * heads + head) * size + at, gradient, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def outputs(
    x, dt, A, B, C, D, lengths, seq_idx, cu_seqlens, table, h, y,
    length, chunks, heads, group_heads, head_size, state_size,
    x_row, x_token, x_head, b_row, b_token, b_group, c_row, c_token, c_group,
    HAS_D: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, PACKED: tl.constexpr,
    PRECISE: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y of one chunk and head; N is a tile of the state's columns."""
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row, first, stop = slot_bounds(slot, cu_seqlens, table, length, chunks, PACKED, Q)
    if first < stop:
        q, t, here, real = tokens_of(first, stop, Q)
        p = tl.arange(0, P)
        in_head = p < head_size
        B += row * b_row + here * b_token + (head // group_heads) * b_group
        C += row * c_row + here * c_token + (head // group_heads) * c_group
        h += (slot.to(tl.int64) * heads + head) * head_size * state_size
        scores = tl.zeros([Q, Q], tl.float32)
        sums = tl.zeros([Q, P], tl.float32)
        for k in range(tl.cdiv(state_size, N)):
            n = k * N + tl.arange(0, N)
            keys = load_tile(B, q, b_token, real, n, state_size).to(DOT)
            queries = load_tile(C, q, c_token, real, n, state_size).to(DOT)
            state = load_tile(h, p, state_size, in_head, n, state_size).to(DOT)
            scores = tl.dot(queries, tl.trans(keys), acc=scores, input_precision=INPUT)
            sums = tl.dot(queries, tl.trans(state), acc=sums, input_precision=INPUT)
        step, s, into, _, _, document = steps_of(
            dt, A, lengths, seq_idx, row, first, stop, length, heads, head, HAS_LENGTHS, HAS_SEQ_IDX, PRECISE, Q
        )
        weights = scores * decay_between(s, document, HAS_SEQ_IDX, Q) * step[None, :]
        values = load_tile(x + row * x_row + here * x_token + head * x_head, q, x_token, real, p, head_size)
        sums = tl.dot(weights.to(DOT), values.to(DOT), acc=sums * into[:, None], input_precision=INPUT)
        if HAS_D:
            sums += values.to(tl.float32) * tl.load(D + head)
        y += ((row * length + here) * heads + head) * head_size
        store_tile(y, q, heads * head_size, real, p, in_head, sums)


@triton.jit(do_not_specialize=VARYING)
def value_gradients(
    x, dt, A, B, C, D, lengths, seq_idx, cu_seqlens, table, h, g, dy, dx, ddt, dA, dD,
    length, chunks, heads, group_heads, head_size, state_size,
    x_row, x_token, x_head, b_row, b_token, b_group, c_row, c_token, c_group, y_row, y_token, y_head,
    HAS_D: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, PACKED: tl.constexpr,
    PRECISE: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dx and ddt of one chunk and head, and what the chunk adds to dA and dD; N is a tile of the state's columns."""
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row, first, stop = slot_bounds(slot, cu_seqlens, table, length, chunks, PACKED, Q)
    mine = slot.to(tl.int64) * heads + head
    if first >= stop:
        tl.store(dA + mine, 0.0)
        if HAS_D:
            tl.store(dD + mine, 0.0)
    else:
        q, t, here, real = tokens_of(first, stop, Q)
        p = tl.arange(0, P)
        in_head = p < head_size
        B += row * b_row + here * b_token + (head // group_heads) * b_group
        C += row * c_row + here * c_token + (head // group_heads) * c_group
        h += mine * head_size * state_size
        g += mine * head_size * state_size
        scores = tl.zeros([Q, Q], tl.float32)
        before = tl.zeros([Q, P], tl.float32)  # h C_t
        after = tl.zeros([Q, P], tl.float32)  # g B_t
        both = tl.zeros([P, N], tl.float32)
        for k in range(tl.cdiv(state_size, N)):
            n = k * N + tl.arange(0, N)
            keys = load_tile(B, q, b_token, real, n, state_size).to(DOT)
            queries = load_tile(C, q, c_token, real, n, state_size).to(DOT)
            state = load_tile(h, p, state_size, in_head, n, state_size)
            gradient = load_tile(g, p, state_size, in_head, n, state_size)
            scores = tl.dot(queries, tl.trans(keys), acc=scores, input_precision=INPUT)
            before = tl.dot(queries, tl.trans(state.to(DOT)), acc=before, input_precision=INPUT)
            after = tl.dot(keys, tl.trans(gradient.to(DOT)), acc=after, input_precision=INPUT)
            both += state.to(tl.float32) * gradient.to(tl.float32)
        step, s, into, out, through, document = steps_of(
            dt, A, lengths, seq_idx, row, first, stop, length, heads, head, HAS_LENGTHS, HAS_SEQ_IDX, PRECISE, Q
        )
        values = load_tile(x + row * x_row + here * x_token + head * x_head, q, x_token, real, p, head_size)
        douts = load_tile(dy + row * y_row + here * y_token + head * y_head, q, y_token, real, p, head_size)
        # What the exponent s_t gets: out of the state before, less what other tokens get of t within the chunk.
        dexponent = into * tl.sum(douts.to(tl.float32) * before, 1)
        scores *= decay_between(s, document, HAS_SEQ_IDX, Q)
        pairs = tl.dot(douts.to(DOT), tl.trans(values.to(DOT)), input_precision=INPUT)
        pairs = tl.where(q[:, None] > q[None, :], pairs * scores * step[None, :], 0.0)
        dexponent += tl.sum(pairs, 1) - tl.sum(pairs, 0)
        after *= out[:, None]
        leaving = step * tl.sum(values.to(tl.float32) * after, 1)
        dvalues = tl.dot(tl.trans(scores.to(DOT)), douts.to(DOT), acc=after, input_precision=INPUT)
        # a_t is in the exponents of all that passes token t: s_t and later, what leaves earlier, and the state.
        kept = through * tl.sum(tl.sum(both, 1), 0)
        da = tl.cumsum(dexponent, 0, reverse=True) + (tl.cumsum(leaving, 0) - leaving) + kept
        dstep = da * tl.load(A + head) + tl.sum(dvalues * values.to(tl.float32), 1)
        if HAS_LENGTHS:
            dstep = tl.where(t < tl.load(lengths + row), dstep, 0.0)
        tl.store(ddt + (row * length + here) * heads + head + q * heads, dstep, mask=real)
        tl.store(dA + mine, tl.sum(da * step, 0))
        dvalues *= step[:, None]
        if HAS_D:
            dvalues += douts.to(tl.float32) * tl.load(D + head)
            tl.store(dD + mine, tl.sum(tl.sum(douts.to(tl.float32) * values.to(tl.float32), 1), 0))
        dx += ((row * length + here) * heads + head) * head_size
        store_tile(dx, q, heads * head_size, real, p, in_head, dvalues)


@triton.jit(do_not_specialize=VARYING)
def key_gradients(
    x, dt, A, B, C, lengths, seq_idx, cu_seqlens, table, h, g, dy, dB, dC,
    batch, length, chunks, heads, group_heads, block_heads, blocks, head_size, state_size,
    x_row, x_token, x_head, b_row, b_token, b_group, c_row, c_token, c_group, y_row, y_token, y_head,
    HAS_LENGTHS: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, PACKED: tl.constexpr,
    PRECISE: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What block_heads heads of one group add to dB and dC of one chunk, in a tile of N columns."""
    tiles = tl.cdiv(state_size, N)
    groups = heads // group_heads
    program = tl.program_id(0)
    tile, program = program % tiles, program // tiles
    block, program = program % blocks, program // blocks
    group, slot = program % groups, program // groups
    row, first, stop = slot_bounds(slot, cu_seqlens, table, length, chunks, PACKED, Q)
    if first < stop:
        q, t, here, real = tokens_of(first, stop, Q)
        p = tl.arange(0, P)
        n = tile * N + tl.arange(0, N)
        in_head, in_state = p < head_size, n < state_size
        keys = load_tile(B + row * b_row + here * b_token + group * b_group, q, b_token, real, n, state_size).to(DOT)
        queries = load_tile(C + row * c_row + here * c_token + group * c_group, q, c_token, real, n, state_size).to(DOT)
        dkeys = tl.zeros([Q, N], tl.float32)
        dqueries = tl.zeros([Q, N], tl.float32)
        begin = group * group_heads + block * block_heads
        for head in range(begin, tl.minimum(begin + block_heads, (group + 1) * group_heads)):
            step, s, into, out, _, document = steps_of(
                dt, A, lengths, seq_idx, row, first, stop, length, heads, head, HAS_LENGTHS, HAS_SEQ_IDX, PRECISE, Q
            )
            values = load_tile(x + row * x_row + here * x_token + head * x_head, q, x_token, real, p, head_size)
            douts = load_tile(dy + row * y_row + here * y_token + head * y_head, q, y_token, real, p, head_size)
            size = head_size.to(tl.int64) * state_size
            mine = (slot.to(tl.int64) * heads + head) * size
            state = load_tile(h + mine, p, state_size, in_head, n, state_size).to(DOT)
            gradient = load_tile(g + mine, p, state_size, in_head, n, state_size).to(DOT)
            pairs = tl.dot(douts.to(DOT), tl.trans(values.to(DOT)), input_precision=INPUT)
            pairs = (pairs * decay_between(s, document, HAS_SEQ_IDX, Q) * step[None, :]).to(DOT)
            dqueries = tl.dot(pairs, keys, acc=dqueries, input_precision=INPUT)
            douts = (douts.to(tl.float32) * into[:, None]).to(DOT)
            dqueries = tl.dot(douts, state, acc=dqueries, input_precision=INPUT)
            dkeys = tl.dot(tl.trans(pairs), queries, acc=dkeys, input_precision=INPUT)
            values = (values.to(tl.float32) * (step * out)[:, None]).to(DOT)
            dkeys = tl.dot(values, gradient, acc=dkeys, input_precision=INPUT)
        base = (((block * batch + row) * length + here) * groups + group) * state_size
        store_tile(dB + base, q, groups * state_size, real, n, in_state, dkeys)
        store_tile(dC + base, q, groups * state_size, real, n, in_state, dqueries)
