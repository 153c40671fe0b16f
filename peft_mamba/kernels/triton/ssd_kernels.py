"""The kernels of Mamba-2's scan in the block form of 2405.21060, section 6; `ssd` calls them.

A sequence is cut into chunks of Q tokens. With a_t = dt_t A, s_t its sum within the chunk up to t, and h the state
before the chunk,

    y_t = Σ_{r≤t} exp(s_t - s_r) (C_t·B_r) dt_r x_r + exp(s_t) h C_t + D x_t
    h'  = exp(s_Q) h + Σ_r exp(s_Q - s_r) dt_r x_r B_rᵀ

`steps` takes the exponentials of the sums, once for the others. `states` and `state_gradients` walk through the chunks
of a sequence, forwards for h and backwards for its gradient g. `outputs`, `value_gradients` and `key_gradients` then
take every chunk by itself, several heads of a group one after the other, which share B and C. `step_gradients` puts
together the gradients of dt and A. Where a document starts inside a chunk, the terms that would cross are left out.

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
VARYING = ["batch", "slots", "length", "chunks", "heads", "group_heads", "block_heads", "blocks", "tiles"]


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
def decay_between(s, mine, documents, slot, HAS_SEQ_IDX: tl.constexpr, Q: tl.constexpr, BACK: tl.constexpr):
    """(Q, Q): exp(s_t - s_r) at [t, r], with BACK at [r, t]; 0 where r > t or in another document."""
    i = tl.arange(0, Q)
    sums = tl.load(s + mine * Q + i)
    if BACK:
        differences, reached = sums[None, :] - sums[:, None], i[None, :] >= i[:, None]
    else:
        differences, reached = sums[:, None] - sums[None, :], i[:, None] >= i[None, :]
    if HAS_SEQ_IDX:
        document = tl.load(documents + slot.to(tl.int64) * Q + i)
        reached = reached & (document[:, None] == document[None, :])
    return tl.exp2(tl.where(reached, differences.to(tl.float32), float("-inf")))


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
def state_tile(heads, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Sequence, head and the tile of their state that are this program's: rows, columns, offsets, which there are."""
    columns = tl.cdiv(STATE_SIZE, N)
    tiles = tl.cdiv(HEAD_SIZE, P) * columns  # one after the other: they read the same tokens
    tile, program = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    p = (tile // columns) * P + tl.arange(0, P)
    n = (tile % columns) * N + tl.arange(0, N)
    inside = (p < HEAD_SIZE)[:, None] & (n < STATE_SIZE)[None, :]
    return program // heads, program % heads, p, n, p[:, None] * STATE_SIZE + n[None, :], inside


@triton.jit
def heads_of(program, heads, group_heads, block_heads, blocks):
    """The slot, the group, the block of its heads, and the first and the end of these, that are this program's."""
    groups = heads // group_heads
    block, program = program % blocks, program // blocks
    group, slot = program % groups, program // groups
    begin = group * group_heads + block * block_heads
    return slot, group, block, begin, tl.minimum(begin + block_heads, (group + 1) * group_heads)


@triton.jit(do_not_specialize=VARYING)
def steps(
    dt, A, lengths, seq_idx, cu_seqlens, table, step, s, into, out, through, documents, length, chunks, heads,
    HAS_LENGTHS: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, PACKED: tl.constexpr, PRECISE: tl.constexpr,
    Q: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Of one chunk and H heads: step sizes, s_t / ln 2, and the factors with which the state before comes to a token,
    a token to the state after, and the former state to the latter; and the documents counted from the chunk on."""
    slot = tl.program_id(0)
    head = tl.program_id(1) * H + tl.arange(0, H)
    there = head < heads
    row, first, stop = slot_bounds(slot, cu_seqlens, table, length, chunks, PACKED, Q)
    if first < stop:
        q, t, here, real = tokens_of(first, stop, Q)
        document = tl.zeros([Q], tl.int32)
        if HAS_SEQ_IDX:
            own = tl.load(seq_idx + row * length + t, mask=real, other=0)
            before = tl.load(seq_idx + row * length + t - 1, mask=real & (t > 0), other=0)
            document = tl.cumsum(((own != before) & (t > 0) & real).to(tl.int32), 0)
            tl.store(documents + slot.to(tl.int64) * Q + q, document)
        last = tl.max(document, 0)
        if HAS_LENGTHS:
            real = real & (t < tl.load(lengths + row))
        sizes = tl.load(
            dt + (row * length + here) * heads + q[:, None] * heads + head[None, :],
            mask=real[:, None] & there[None, :],
            other=0.0,
        )
        a = sizes * (tl.load(A + head, mask=there, other=0.0) * LOG2E)[None, :]
        if PRECISE:  # of large sums only differences are used
            a = a.to(tl.float64)
        sums = tl.cumsum(a, 0)
        total = tl.sum(a, 0)
        mine = slot.to(tl.int64) * heads + head
        at, inside = mine[None, :] * Q + q[:, None], there[None, :]
        tl.store(step + at, sizes, mask=inside)
        tl.store(s + at, sums, mask=inside)
        reached = tl.where((document == 0)[:, None], tl.exp2(sums.to(tl.float32)), 0.0)
        tl.store(into + at, reached, mask=inside)
        left = tl.where((document == last)[:, None], tl.exp2((total[None, :] - sums).to(tl.float32)), 0.0)
        tl.store(out + at, left, mask=inside)
        tl.store(through + mine, tl.where(last == 0, tl.exp2(total.to(tl.float32)), 0.0), mask=there)


@triton.jit(do_not_specialize=VARYING)
def states(
    x, B, step, out, through, initial, cu_seqlens, h, final,
    length, chunks, heads, group_heads, x_row, x_token, x_head, b_row, b_token, b_group,
    HAS_INITIAL: tl.constexpr, WITH_FINAL: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """h before each chunk of a sequence and head, and after the last one; P and N are tiles of the state."""
    sequence, head, p, n, at, inside = state_tile(heads, HEAD_SIZE, STATE_SIZE, P, N)
    row, start, stop, slot = sequence_bounds(sequence, cu_seqlens, length, chunks, PACKED, Q)
    x += row * x_row + head * x_head
    B += row * b_row + (head // group_heads) * b_group
    size = HEAD_SIZE * STATE_SIZE
    state = tl.zeros([P, N], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + (sequence.to(tl.int64) * heads + head) * size + at, mask=inside, other=0.0)
    for i in range(tl.cdiv(stop - start, Q)):
        q, t, here, real = tokens_of(start + i * Q, stop, Q)
        mine = (slot + i) * heads + head
        tl.store(h + mine * size + at, state.to(h.dtype.element_ty), mask=inside)
        kept = tl.load(through + mine)
        weights = tl.load(step + mine * Q + q) * tl.load(out + mine * Q + q)
        values = load_tile(x + here * x_token, q, x_token, real, p, HEAD_SIZE).to(tl.float32) * weights[:, None]
        keys = load_tile(B + here * b_token, q, b_token, real, n, STATE_SIZE)
        state = tl.dot(tl.trans(values.to(DOT)), keys.to(DOT), acc=state * kept, input_precision=INPUT)
    if WITH_FINAL:
        tl.store(final + (sequence.to(tl.int64) * heads + head) * size + at, state, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def state_gradients(
    dy, C, into, through, dfinal, cu_seqlens, g, dinitial,
    length, chunks, heads, group_heads, y_row, y_token, y_head, c_row, c_token, c_group,
    HAS_FINAL: tl.constexpr, WITH_INITIAL: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each chunk, and of the one before the first."""
    sequence, head, p, n, at, inside = state_tile(heads, HEAD_SIZE, STATE_SIZE, P, N)
    row, start, stop, slot = sequence_bounds(sequence, cu_seqlens, length, chunks, PACKED, Q)
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
        tl.store(g + mine * size + at, gradient.to(g.dtype.element_ty), mask=inside)
        kept = tl.load(through + mine)
        weights = tl.load(into + mine * Q + q)
        values = load_tile(dy + here * y_token, q, y_token, real, p, HEAD_SIZE).to(tl.float32) * weights[:, None]
        queries = load_tile(C + here * c_token, q, c_token, real, n, STATE_SIZE)
        gradient = tl.dot(tl.trans(values.to(DOT)), queries.to(DOT), acc=gradient * kept, input_precision=INPUT)
    if WITH_INITIAL:
        tl.store(dinitial + (sequence.to(tl.int64) * heads + head) * size + at, gradient, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def outputs(
    x, B, C, D, step, s, into, documents, cu_seqlens, table, h, y,
    length, chunks, heads, group_heads, block_heads, blocks,
    x_row, x_token, x_head, b_row, b_token, b_group, c_row, c_token, c_group,
    HAS_D: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """y of one chunk and block_heads heads of one group; N is one of TILES tiles of the state's columns."""
    slot, group, _, begin, end = heads_of(tl.program_id(0), heads, group_heads, block_heads, blocks)
    row, first, stop = slot_bounds(slot, cu_seqlens, table, length, chunks, PACKED, Q)
    if first < stop:
        q, t, here, real = tokens_of(first, stop, Q)
        p, n = tl.arange(0, P), tl.arange(0, N)
        in_head = p < HEAD_SIZE
        B += row * b_row + here * b_token + group * b_group
        C += row * c_row + here * c_token + group * c_group
        x += row * x_row + here * x_token
        y += (row * length + here) * heads * HEAD_SIZE
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
            state = h + mine * HEAD_SIZE * STATE_SIZE
            sums = tl.zeros([Q, P], tl.float32)
            for k in range(TILES):
                if TILES > 1:
                    queries = load_tile(C, q, c_token, real, k * N + n, STATE_SIZE).to(DOT)
                columns = load_tile(state, p, STATE_SIZE, in_head, k * N + n, STATE_SIZE).to(DOT)
                sums = tl.dot(queries, tl.trans(columns), acc=sums, input_precision=INPUT)
            sums *= tl.load(into + mine * Q + q)[:, None]
            weights = scores * decay_between(s, mine, documents, slot, HAS_SEQ_IDX, Q, False)
            weights *= tl.load(step + mine * Q + q)[None, :]
            values = load_tile(x + head * x_head, q, x_token, real, p, HEAD_SIZE)
            sums = tl.dot(weights.to(DOT), values.to(DOT), acc=sums, input_precision=INPUT)
            if HAS_D:
                sums += values.to(tl.float32) * tl.load(D + head)
            store_tile(y + head * HEAD_SIZE, q, heads * HEAD_SIZE, real, p, in_head, sums)


@triton.jit(do_not_specialize=VARYING)
def value_gradients(
    x, B, C, D, step, s, out, documents, cu_seqlens, table, g, dy, dx, direct, within, leaving, dD,
    length, chunks, heads, group_heads, block_heads, blocks,
    x_row, x_token, x_head, b_row, b_token, b_group, c_row, c_token, c_group, y_row, y_token, y_head,
    HAS_D: tl.constexpr, WITH_D: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, INPUT: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """dx of one chunk and block_heads heads of one group, and what the chunk adds to dD. For `step_gradients`:
    `direct`, what dt_t gets as the factor of x_t, `leaving`, the part of it that comes from the state after, and
    `within`, what s_t gets out of other tokens of the chunk, less what they get out of t."""
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
        for head in range(begin, end):
            mine = slot.to(tl.int64) * heads + head
            gradient = g + mine * HEAD_SIZE * STATE_SIZE
            values = load_tile(x + head * x_head, q, x_token, real, p, HEAD_SIZE)
            douts = load_tile(dy + head * y_head, q, y_token, real, p, HEAD_SIZE).to(DOT)
            sizes = tl.load(step + mine * Q + q)
            weights = scores * decay_between(s, mine, documents, slot, HAS_SEQ_IDX, Q, True)
            # In float32, and without a token's pair with itself: the sums are of what largely cancels out.
            pairs = tl.dot(values.to(DOT), tl.trans(douts), input_precision=INPUT) * weights * sizes[:, None]
            pairs = tl.where(q[:, None] < q[None, :], pairs, 0.0)
            tl.store(within + mine * Q + q, tl.sum(pairs, 0) - tl.sum(pairs, 1))
            weights = weights.to(DOT)
            after = tl.zeros([Q, P], tl.float32)  # g B_t
            for k in range(TILES):
                if TILES > 1:
                    keys = load_tile(B, q, b_token, real, k * N + n, STATE_SIZE).to(DOT)
                columns = load_tile(gradient, p, STATE_SIZE, in_head, k * N + n, STATE_SIZE).to(DOT)
                after = tl.dot(keys, tl.trans(columns), acc=after, input_precision=INPUT)
            after *= tl.load(out + mine * Q + q)[:, None]
            tl.store(leaving + mine * Q + q, tl.sum(values.to(tl.float32) * after, 1))
            dvalues = tl.dot(weights, douts, acc=after, input_precision=INPUT)
            tl.store(direct + mine * Q + q, tl.sum(dvalues * values.to(tl.float32), 1))
            dvalues *= sizes[:, None]
            if HAS_D:
                dvalues += douts.to(tl.float32) * tl.load(D + head)
            if WITH_D:
                tl.store(dD + mine, tl.sum(douts.to(tl.float32) * values.to(tl.float32)))
            store_tile(dx + head * HEAD_SIZE, q, heads * HEAD_SIZE, real, p, in_head, dvalues)
    elif WITH_D:
        for head in range(begin, end):
            tl.store(dD + slot.to(tl.int64) * heads + head, 0.0)


@triton.jit
def one_key_gradient(
    x, dy, own, other, scale, step, s, documents, state, gradient, reading, both,
    slot, part, heads, begin, end, q, real, n, x_token, x_head, y_token, y_head, own_token, other_token,
    BACK: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """What the heads from begin to end add to dC (own is C, other B); with BACK to dB, for which x and dy, C and B, and
    the state and its gradient change places."""
    p = tl.arange(0, P)
    keys = load_tile(other, q, other_token, real, n, STATE_SIZE).to(DOT)
    total = tl.zeros([Q, N], tl.float32)
    for head in range(begin, end):
        mine = slot.to(tl.int64) * heads + head
        values = load_tile(x + head * x_head, q, x_token, real, p, HEAD_SIZE).to(DOT)
        douts = load_tile(dy + head * y_head, q, y_token, real, p, HEAD_SIZE).to(DOT)
        columns = load_tile(state + mine * HEAD_SIZE * STATE_SIZE, p, STATE_SIZE, p < HEAD_SIZE, n, STATE_SIZE)
        sizes = tl.load(step + mine * Q + q)
        factor = tl.load(scale + mine * Q + q)
        pairs = tl.dot(douts, tl.trans(values), input_precision=INPUT)
        pairs *= decay_between(s, mine, documents, slot, HAS_SEQ_IDX, Q, BACK)
        if BACK:
            pairs *= sizes[:, None]
            factor *= sizes
        else:
            pairs *= sizes[None, :]
            at = gradient + mine * HEAD_SIZE * STATE_SIZE
            opposite = load_tile(at, p, STATE_SIZE, p < HEAD_SIZE, n, STATE_SIZE).to(tl.float32)
            tl.store(both + part + mine, tl.sum(opposite * columns.to(tl.float32)))
        added = tl.dot(douts, columns.to(DOT), input_precision=INPUT) * factor[:, None]
        if not BACK:
            ours = load_tile(own, q, own_token, real, n, STATE_SIZE).to(tl.float32)
            tl.store(reading + (part + mine) * Q + q, tl.sum(ours * added, 1))
        total = tl.dot(pairs.to(DOT), keys, acc=total + added, input_precision=INPUT)
    return total


@triton.jit(do_not_specialize=VARYING)
def key_gradients(
    x, B, C, step, s, into, out, documents, cu_seqlens, table, h, g, dy, dB, dC, reading, both,
    batch, slots, length, chunks, heads, group_heads, block_heads, blocks,
    x_row, x_token, x_head, b_row, b_token, b_group, c_row, c_token, c_group, y_row, y_token, y_head,
    HAS_SEQ_IDX: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, INPUT: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr,
):  # fmt: skip
    """What block_heads heads of one group add to dC or dB of one chunk in a tile of N columns; one program after the
    other, as both read the same. For `step_gradients`, of these columns and every head: what s_t gets out of the state
    before, which is C_t times the part of dC_t from there; and the product of h and g."""
    back, program = tl.program_id(0) % 2, tl.program_id(0) // 2
    tiles = tl.cdiv(STATE_SIZE, N)
    tile = program % tiles
    slot, group, block, begin, end = heads_of(program // tiles, heads, group_heads, block_heads, blocks)
    row, first, stop = slot_bounds(slot, cu_seqlens, table, length, chunks, PACKED, Q)
    if first < stop:
        q, _, here, real = tokens_of(first, stop, Q)
        n = tile * N + tl.arange(0, N)
        x += row * x_row + here * x_token
        dy += row * y_row + here * y_token
        B += row * b_row + here * b_token + group * b_group
        C += row * c_row + here * c_token + group * c_group
        part = tile.to(tl.int64) * slots * heads
        groups = heads // group_heads
        at = (((block * batch + row) * length + here) * groups + group) * STATE_SIZE
        if back == 0:
            total = one_key_gradient(
                x, dy, C, B, into, step, s, documents, h, g, reading, both,
                slot, part, heads, begin, end, q, real, n, x_token, x_head, y_token, y_head, c_token, b_token,
                False, HAS_SEQ_IDX, DOT, INPUT, Q, P, N, HEAD_SIZE, STATE_SIZE,
            )  # fmt: skip
            store_tile(dC + at, q, groups * STATE_SIZE, real, n, n < STATE_SIZE, total)
        else:
            total = one_key_gradient(
                dy, x, B, C, out, step, s, documents, g, h, reading, both,
                slot, part, heads, begin, end, q, real, n, y_token, y_head, x_token, x_head, b_token, c_token,
                True, HAS_SEQ_IDX, DOT, INPUT, Q, P, N, HEAD_SIZE, STATE_SIZE,
            )  # fmt: skip
            store_tile(dB + at, q, groups * STATE_SIZE, real, n, n < STATE_SIZE, total)


@triton.jit(do_not_specialize=VARYING)
def step_gradients(
    A, step, through, lengths, cu_seqlens, table, direct, within, leaving, reading, both, ddt, dA,
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
        for k in range(tiles):
            part = slots.to(tl.int64) * heads * k
            exponent += tl.load(reading + part * Q + at, mask=inside, other=0.0)
            kept += tl.load(both + part + mine, mask=there, other=0.0)
        kept *= tl.load(through + mine, mask=there, other=0.0)
        sizes = tl.load(step + at, mask=inside, other=0.0)
        left = tl.load(leaving + at, mask=inside, other=0.0) * sizes
        # a_t is in the exponents of all that passes token t: s_t and later, what leaves earlier, and the state.
        gradient = tl.cumsum(exponent, 0, reverse=True) + (tl.cumsum(left, 0) - left) + kept[None, :]
        da = tl.sum(gradient * sizes, 0)
        gradient *= tl.load(A + head, mask=there, other=0.0)[None, :]
        gradient += tl.load(direct + at, mask=inside, other=0.0)
        if HAS_LENGTHS:
            gradient = tl.where((t < tl.load(lengths + row))[:, None], gradient, 0.0)
        store_tile(ddt + (row * length + here) * heads, q, heads, real, head, there, gradient)
    tl.store(dA + mine, da, mask=there)
