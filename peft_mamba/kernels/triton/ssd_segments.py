"""What lets few long sequences fill a GPU in Mamba-2's scan: they are cut into segments, which run side by side.

`states` and `state_gradients` walk through each segment twice: first from nothing, for what it leaves behind, and, when
`join_segments` has made of that what each segment starts from, from there.
"""
# mypy: ignore-errors
# (Triton's language shares Python's syntax, not its types.)

from __future__ import annotations

import triton
import triton.language as tl

from .ssd_chunks import VARYING, sequence_bounds


@triton.jit
def segment_bounds(
    place, cu_seqlens, length, chunks, segments, span, SEGMENTED: tl.constexpr, PACKED: tl.constexpr, Q: tl.constexpr
):
    """`sequence_bounds` of the place-th segment, of `span` chunks at most, counted through all sequences."""
    if SEGMENTED:
        row, start, stop, slot = sequence_bounds(place // segments, cu_seqlens, length, chunks, PACKED, Q)
        before = place % segments * span
        start += before * Q
        return row, start, tl.minimum(stop, start + span * Q), slot + before
    else:
        return sequence_bounds(place, cu_seqlens, length, chunks, PACKED, Q)


@triton.jit(do_not_specialize=VARYING)
def join_segments(
    ends, decays, first, last, heads, segments, size,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, WITH_LAST: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Overwrite what each segment leaves behind a zero state, in `ends`, by what it starts from.

    `ends` has a state of `size` numbers for each head of each segment of each sequence, `decays` what is left of a
    state behind the segment. REVERSE goes against time, for gradients. `first`, a state for each sequence and head, is
    what the first segment (REVERSE: the last one) starts from, `last` what the other end leaves. A program has SIZE
    numbers of a state, and loads what it needs of K segments at once.
    """
    sequence, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = at < size
    whole = tl.program_id(1).to(tl.int64) * size + at
    state = tl.zeros([SIZE], tl.float32)
    if HAS_FIRST:
        state += tl.load(first + whole, mask=inside, other=0.0)
    for begin in range(0, segments, K):
        places, theres, own, kept = (), (), (), ()
        for k in tl.static_range(K):
            there = begin + k < segments
            segment = segments - 1 - begin - k if REVERSE else begin + k
            place = (sequence * segments + segment).to(tl.int64) * heads + head
            places, theres = places + (place,), theres + (there,)
            own = own + (tl.load(ends + place * size + at, mask=inside & there, other=0.0),)
            kept = kept + (tl.load(decays + place, mask=there, other=1.0),)
        for k in tl.static_range(K):
            tl.store(ends + places[k] * size + at, state, mask=inside & theres[k])
            state = state * kept[k] + own[k]
    if WITH_LAST:
        tl.store(last + whole, state, mask=inside)
