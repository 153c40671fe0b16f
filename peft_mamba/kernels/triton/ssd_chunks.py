"""What the kernels of Mamba-2's scan share; they follow the block form of 2405.21060, section 6.

A sequence is cut into chunks of Q tokens. With a_t = dt_t A, s_t its sum within the chunk up to t, and h the state
before the chunk,

    y_t = Σ_{r≤t} exp(s_t - s_r) (C_t·B_r) dt_r x_r + exp(s_t) h C_t + D x_t
    h'  = exp(s_Q) h + Σ_r exp(s_Q - s_r) dt_r x_r B_rᵀ

`steps` takes the exponentials of the sums, once for the others. Where a document starts inside a chunk, the terms that
would cross are left out.

A slot is a chunk's place in the buffers of states. The rows of a batch have `chunks` of them each; sequence s of a
packed row starts at slot cu_seqlens[s] // Q + s, which leaves enough for those before it, and `table` tells whose a
slot is.
"""
# mypy: ignore-errors
# (Triton's language shares Python's syntax, not its types.)

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import LOG2E

# Differ from batch to batch, or make no faster kernel: none is compiled anew for a multiple of 16 or a 1 among them.
VARYING = ["batch", "slots", "sequences", "length", "chunks", "heads", "group_heads", "block_heads", "blocks", "tiles"]
VARYING += ["segments", "span"]


@triton.jit(do_not_specialize=VARYING)
def chunk_table(cu_seqlens, table, sequences, slots, Q: tl.constexpr):
    """table[slot] = sequence for the slots of the sequence program_id(0), and for empty ones from there to the next."""
    sequence = tl.program_id(0)
    first = tl.load(cu_seqlens + sequence) // Q + sequence
    end = tl.where(sequence == sequences - 1, slots, tl.load(cu_seqlens + sequence + 1) // Q + sequence + 1)
    for slot in range(first, end):
        tl.store(table + slot, sequence)


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
    row, first, stop, _, _ = slot_of_sequence(slot, cu_seqlens, table, length, chunks, PACKED, Q)
    return row, first, stop


@triton.jit
def slot_of_sequence(slot, cu_seqlens, table, length, chunks, PACKED: tl.constexpr, Q: tl.constexpr):
    """`slot_bounds`, the sequence, and the number of this chunk in it."""
    if PACKED:
        sequence = tl.load(table + slot)
        begin = tl.load(cu_seqlens + sequence)
        stop = tl.load(cu_seqlens + sequence + 1)
        chunk = slot - begin // Q - sequence
        return (slot * 0).to(tl.int64), begin + chunk * Q, stop, sequence, chunk
    else:
        return (slot // chunks).to(tl.int64), (slot % chunks) * Q, length, slot // chunks, slot % chunks


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


@triton.jit
def _sum_since_start(sum_before, starts_before, sum, starts):
    """Of two stretches one after the other: the sum since the last start, and whether there is a start."""
    return tl.where(starts > 0, sum, sum_before + sum), starts_before | starts


@triton.jit(do_not_specialize=VARYING)
def steps(
    dt, A, lengths, seq_idx, cu_seqlens, table, step, s, into, out, through, documents, length, chunks, heads,
    HAS_LENGTHS: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, RESTARTS: tl.constexpr, PACKED: tl.constexpr,
    PRECISE: tl.constexpr, Q: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Of one chunk and H heads: step sizes, s_t / ln 2, and the factors with which the state before comes to a token,
    a token to the state after, and the former state to the latter; and the documents counted from the chunk on.

    RESTARTS: the state before comes to every document, and sums are taken from the document's start; a chunk with
    several of them has no state after it.
    """
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
        if RESTARTS:
            starts = tl.broadcast_to(((own != before) & (t > first))[:, None], [Q, H])
            sums, _ = tl.associative_scan((a, starts.to(tl.int32)), 0, _sum_since_start)
        else:
            sums = tl.cumsum(a, 0)
        total = tl.sum(a, 0)
        mine = slot.to(tl.int64) * heads + head
        at, inside = mine[None, :] * Q + q[:, None], there[None, :]
        tl.store(step + at, sizes, mask=inside)
        tl.store(s + at, sums, mask=inside)
        reached = tl.exp2(sums.to(tl.float32))
        if not RESTARTS:
            reached = tl.where((document == 0)[:, None], reached, 0.0)
        tl.store(into + at, reached, mask=inside)
        left = tl.where((document == last)[:, None], tl.exp2((total[None, :] - sums).to(tl.float32)), 0.0)
        tl.store(out + at, left, mask=inside)
        kept = tl.exp2(total.to(tl.float32))
        if not RESTARTS:
            kept = tl.where(last == 0, kept, 0.0)
        tl.store(through + mine, kept, mask=there)
