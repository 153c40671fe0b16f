"""Mamba-2's scan in Triton, forward and backward; shapes and meanings as in `reference`.

Backward keeps the inputs alone and recomputes the states between chunks, which are larger than all of them. bfloat16
is multiplied in bfloat16, as the tensor cores do, and summed in float32. float16 is multiplied in TF32, which has its
mantissa and float32's range: states grow beyond what float16 holds. float32 is multiplied in float32, unless
`torch.backends.cuda.matmul.allow_tf32`.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .. import chunked
from ..host import ON_HOST
from ..reference import check_packed, kept_in, put
from . import ssd_backward, ssd_forward, ssd_segments
from .common import Tensor, cdiv, readable, row_strides
from .ssd_families import Families
from .ssd_plan import STEP_HEADS, Plan, Steps, chunk_of, strides_of
from .step import is_step, ssd_step

# What the registers hold; wider heads go to `chunked`.
MAX_HEAD_SIZE = 128
# A program takes up to so many heads of a chunk, which share B and C; fewer where there are too few programs for that.
OUTPUT_HEADS, PACKED_OUTPUT_HEADS, GRADIENT_HEADS = 16, 8, 12
# Numbers of a state that a program joins segments for, and of how many segments at once.
JOIN = {"SIZE": 256, "K": 8}


def _states(
    plan: Plan, steps: Steps, x, B, initial_state, initial_index, cu_seqlens, h, final_state, direct=False
) -> Tensor | None:
    """What is left of a state behind each segment, for `_state_gradients`; None: there are none."""
    constants, programs = plan.state_tiles()

    def launch(initial, final, decays, kept):
        ssd_forward.states[(programs,)](
            *(x, B, steps.step, steps.out, steps.through, initial, initial_index, cu_seqlens, h, final, decays),
            *(*plan.sizes, plan.segments, plan.span, *strides_of(x), *strides_of(B)),
            HAS_INITIAL=initial is not None,
            INDEXED=initial_index is not None,
            DIRECT=direct,
            WITH_FINAL=final is not None,
            KEPT=kept,
            **constants,
            **plan.launch("states of a packed row" if direct else "states"),
        )

    if plan.segments == 1:
        launch(initial_state, final_state, None, True)
        return None
    ends, decays = plan.segment_states(x)
    launch(None, ends, decays, False)
    _join(plan, ends, decays, initial_state, final_state, False)
    launch(ends, None, None, True)
    return decays


def _state_gradients(plan: Plan, steps: Steps, dy, C, dfinal, cu_seqlens, g, dinitial, decays) -> None:
    constants, programs = plan.state_tiles()

    def launch(final, initial, kept):
        ssd_backward.state_gradients[(programs,)](
            *(dy, C, steps.into, steps.through, final, cu_seqlens, g, initial),
            *(*plan.sizes, plan.segments, plan.span, *strides_of(dy), *strides_of(C)),
            HAS_FINAL=final is not None,
            WITH_INITIAL=initial is not None,
            KEPT=kept,
            **constants,
            **plan.launch("states"),
        )

    if plan.segments == 1:
        launch(dfinal, dinitial, True)
        return
    ends, _ = plan.segment_states(dy)
    launch(None, ends, False)
    _join(plan, ends, decays, dfinal, dinitial, True)
    launch(ends, None, True)


def _join(plan: Plan, ends, decays, first, last, reverse: bool) -> None:
    size = plan.head_size * plan.state_size
    ssd_segments.join_segments[(cdiv(size, JOIN["SIZE"]), plan.sequences * plan.heads)](
        *(ends, decays, first, last, plan.heads, plan.segments, size),
        REVERSE=reverse,
        HAS_FIRST=first is not None,
        WITH_LAST=last is not None,
        **JOIN,
    )


def _forward(
    x, dt, A, B, C, D, initial_state, lengths, seq_idx, cu_seqlens, return_final_state,
    *, initial_index=None, memo=None, out=None,
):  # fmt: skip
    known = None if memo is None or return_final_state else memo.get(ON_HOST)
    restarts = one_chunk = False
    if known is not None and cu_seqlens is not None:
        given = (known, chunk_of(x), cu_seqlens, initial_index, initial_state is not None)
        families: Families = kept_in(memo, ("families", chunk_of(x)), lambda: Families.of(*given))
        cu_seqlens, initial_index, seq_idx, one_chunk = families
        restarts = seq_idx is not None
    plan = Plan.of(x, B, lengths, seq_idx, cu_seqlens, restarts)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    shape = (plan.sequences, plan.heads, plan.head_size, plan.state_size)
    final_state = torch.empty(shape, dtype=torch.float32, device=x.device) if return_final_state else None
    with torch.cuda.device_of(x):
        # Of many short sequences the first chunk is all there is: its state is not worth a copy.
        direct = cu_seqlens is not None
        h, table = plan.states(x, direct), plan.table(cu_seqlens, memo)
        steps = Steps.of(plan, dt, A, lengths, seq_idx, cu_seqlens, table)
        if not one_chunk:
            _states(plan, steps, x, B, initial_state, initial_index, cu_seqlens, h, final_state, direct)
        block_heads, blocks = plan.heads_and_blocks(PACKED_OUTPUT_HEADS if direct else OUTPUT_HEADS)
        ssd_forward.outputs[(plan.slots * plan.groups * blocks,)](
            *(x, B, C, D, steps.step, steps.sums, steps.into, steps.documents),
            *(initial_state, initial_index, cu_seqlens, table, h, y),
            *(*plan.sizes, block_heads, blocks, *strides_of(x), *strides_of(B), *strides_of(C)),
            HAS_D=D is not None,
            HAS_INITIAL=initial_state is not None,
            INDEXED=initial_index is not None,
            DIRECT=direct,
            ONE_CHUNK=one_chunk,
            **plan.only("HAS_SEQ_IDX"),
            **plan.constants,
            **plan.launch("outputs"),
        )
    return y, final_state


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, lengths, seq_idx, cu_seqlens, return_final_state):
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, lengths, seq_idx, cu_seqlens)
        ctx.set_materialize_grads(False)
        return _forward(x, dt, A, B, C, D, initial_state, lengths, seq_idx, cu_seqlens, return_final_state)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):  # type: ignore[override]  # mypy sees the decorator, not the method
        x, dt, A, B, C, D, initial_state, lengths, seq_idx, cu_seqlens = ctx.saved_tensors
        plan = Plan.of(x, B, lengths, seq_idx, cu_seqlens)
        block_heads, blocks = plan.heads_and_blocks(GRADIENT_HEADS)
        dy = torch.zeros_like(x) if dy is None else row_strides(dy)

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=x.device)

        dx, ddt = empty(*x.shape, dtype=x.dtype), empty(*dt.shape)
        dA = empty(plan.slots, plan.heads)
        dD = empty(plan.slots, plan.heads) if ctx.needs_input_grad[5] else None
        # dC's and dB's sums of one block of heads each; themselves where there is but one block.
        partial = empty(blocks, 2, *B.shape, dtype=B.dtype if blocks == 1 else torch.float32)
        dinitial = None if initial_state is None else torch.empty_like(initial_state)
        with torch.cuda.device_of(x):
            h, g, table = plan.states(x), plan.states(x), plan.table(cu_seqlens)
            steps = Steps.of(plan, dt, A, lengths, seq_idx, cu_seqlens, table)
            step, sums, into, out, through, documents = steps
            decays = _states(plan, steps, x, B, initial_state, None, cu_seqlens, h, None)
            dfinal = None if dfinal is None else dfinal.contiguous()
            _state_gradients(plan, steps, dy, C, dfinal, cu_seqlens, g, dinitial, decays)
            strides = (*strides_of(x), *strides_of(B), *strides_of(C), *strides_of(dy))
            direct, within = (torch.empty_like(step) for _ in range(2))
            shared = empty(plan.slots, plan.groups * blocks, *2 * (step.shape[2],), dtype=h.dtype)
            ssd_backward.value_gradients[(plan.slots * plan.groups * blocks,)](
                *(x, B, C, D, step, sums, out, documents, cu_seqlens, table, g, dy, dx, shared),
                *(direct, within, dD, *plan.sizes, block_heads, blocks, *strides),
                HAS_D=D is not None,
                WITH_D=dD is not None,
                **plan.only("HAS_SEQ_IDX"),
                **plan.constants,
                **plan.launch("value_gradients"),
            )
            tiles = cdiv(plan.state_size, plan.constants["N"])
            reading, leaving = (empty(tiles, *step.shape) for _ in range(2))
            both = empty(tiles, *through.shape)
            ssd_backward.key_gradients[(2 * tiles * plan.slots * plan.groups * blocks,)](
                *(x, B, C, step, into, out, cu_seqlens, table, h, g, dy, shared, partial),
                *(reading, leaving, both, plan.batch, plan.slots, *plan.sizes, block_heads, blocks, *strides),
                **plan.only(),
                **plan.constants,
                **plan.launch("key_gradients"),
            )
            ssd_backward.step_gradients[(plan.slots, cdiv(plan.heads, STEP_HEADS))](
                *(A, step, through, lengths, cu_seqlens, table, direct, within, reading, leaving, both, ddt, dA),
                *(plan.slots, plan.length, plan.chunks, plan.heads, tiles),
                **plan.only("HAS_LENGTHS"),
                H=STEP_HEADS,
            )
        dC, dB = partial[0] if blocks == 1 else partial.sum(0).to(B.dtype)
        dA = dA.sum(0) if ctx.needs_input_grad[2] else None
        dD = None if dD is None else dD.sum(0)
        return dx, ddt, dA, dB, dC, dD, dinitial, None, None, None, None


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    initial_index: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    memo: dict | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`reference.ssd`; float64, empty inputs and heads wider than MAX_HEAD_SIZE go to `chunked`.

    x, B and C may be slices of something wider, as long as their last dimension is contiguous; B and C are taken in x's
    dtype. First derivatives only.
    """
    initial_state, initial_index = readable(initial_state, initial_index, cu_seqlens)
    if x.dtype == torch.float64 or x.numel() == 0 or x.shape[3] > MAX_HEAD_SIZE:
        return chunked.ssd(
            *(x, dt, A, B, C, D),
            initial_state=initial_state,
            initial_index=initial_index,
            lengths=lengths,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
            memo=memo,
            out=out,
        )
    if is_step(x, cu_seqlens, dt, A, B, C, D, initial_state):
        y, final_state = ssd_step(
            *(x, dt, A, B, C, D),
            initial_state=initial_state,
            lengths=lengths,
            return_final_state=return_final_state,
        )
        return put(y, out), final_state
    if cu_seqlens is not None:
        check_packed(x, cu_seqlens, initial_state if initial_index is None else initial_index, lengths, seq_idx)
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    given = (
        row_strides(x),
        dt.float().contiguous(),
        A.float().contiguous(),
        row_strides(B.to(x.dtype)),
        row_strides(C.to(x.dtype)),
        None if D is None else D.float().contiguous(),
        None if initial_state is None else initial_state.float().contiguous(),
        None if lengths is None else lengths.to(torch.int32).contiguous(),
        None if seq_idx is None else seq_idx.to(torch.int32).contiguous(),
        cu_seqlens,
        return_final_state,
    )
    if torch.is_grad_enabled():
        y, final_state = _SSD.apply(*given)
        return put(y, out), final_state
    return _forward(*given, initial_index=initial_index, memo=memo, out=out)
