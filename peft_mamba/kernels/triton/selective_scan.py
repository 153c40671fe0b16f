"""Mamba-1's selective scan in Triton, with the gradients of everything and no atomics: a result is always the same.

Around the kernels, B and C (which are small) go to float32, and each program's share of the gradients of A, B, C, D and
delta_bias is summed up.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .. import chunked
from ..reference import Tensor, check_packed, first_of_document, put
from ..room import gradient_place, new_gradient
from .common import BY_PTX, cdiv, readable
from .scan_backward import scan_backward
from .scan_forward import scan_forward
from .scan_memory import SHARED_BYTES
from .scan_ring import STATES, ring_bytes
from .scan_segments import scan_chain, scan_ends, scan_ends_backward
from .scan_sums import sum_shares
from .step import is_step, selective_step

# Channels of a program: the lanes of its one warp.
LANES = 32
# Tokens that are computed together, forward and backward.
FORWARD_GROUP, BACKWARD_GROUP = 4, 2
# Registers a thread of backward, with which three warps share a quarter of a multiprocessor: left alone, it takes more.
BACKWARD_REGISTERS = 168
# Tokens from one checkpoint of the state to the next.
CHECKPOINT = 16
# Of shared memory, CUDA takes so much of each program for itself.
RESERVED_BYTES = 1024
# Backward keeps the states between two checkpoints, one a group, in shared memory if that has room for so many programs
# a multiprocessor, else in global memory.
SHARED_PROGRAMS = 8
# Arguments that are rows of channels, with a stride.
ROWS = {"u", "delta", "z", "y", "dy", "du", "ddelta", "dz"}
# What a kernel is told of the arguments that may be absent.
FLAGS = {"HAS_D": "D", "HAS_Z": "z", "HAS_BIAS": "bias", "HAS_RESETS": "resets", "HAS_LENGTHS": "lengths"}
# Programs of one launch of backward at up to 16 states, at more fewer, which bounds its scratch memory (16 KiB each).
BACKWARD_PROGRAMS = 2**14
# Up to so many warps a multiprocessor, long sequences are cut: into so many, of so many tokens at least.
FEW_WARPS, WARPS_WANTED, SHORTEST_SEGMENT = 8, 96, 256
# Numbers of the state that a program joins segments for, and of how many segments at once.
CHAIN_SIZE, CHAIN_SEGMENTS = 64, 8


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
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
    """`reference.selective_scan`; first derivatives only.

    u, delta and z may be views whose rows lie apart, such as halves of a projection's output. float64 is computed by
    `chunked`.
    """
    initial_state, initial_index = readable(initial_state, initial_index, cu_seqlens)
    if u.dtype == torch.float64:
        return chunked.selective_scan(
            *(u, delta, A, B, C, D, z, delta_bias),
            initial_state=initial_state,
            initial_index=initial_index,
            lengths=lengths,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
            memo=memo,
            out=out,
        )
    if is_step(u, cu_seqlens, delta, A, B, C, D, z, delta_bias, initial_state):
        y, final_state = selective_step(
            *(u, delta, A, B, C, D, z, delta_bias),
            initial_state=initial_state,
            lengths=lengths,
            return_final_state=return_final_state,
        )
        return put(y, out), final_state
    if cu_seqlens is not None:
        check_packed(u, cu_seqlens, initial_state if initial_index is None else initial_index, lengths, seq_idx)
    starts = first_of_document(seq_idx)
    resets = None if starts is None else starts.to(torch.uint8)
    given = u, delta, A, B, C, D, z, delta_bias, initial_state, lengths, resets, cu_seqlens, return_final_state
    if torch.is_grad_enabled():
        # In a tuple, as to autograd it is no input but what comes out; a part of something else is, and is copied to.
        into = (None if out is None or out._is_view() else out,)
        y, final_state = _SelectiveScan.apply(*given, into)
        return (y if into[0] is not None else put(y, out)), final_state
    scan = _forward(*given, initial_index=initial_index, out=out)
    return scan.y, scan.final_state


@dataclass(frozen=True)
class _Layout:
    """How sequences and channels lie over programs and tiles."""

    sequences: int
    length: int  # of each sequence, where all are alike
    channels: int
    states: int
    varlen: bool
    segments: int
    split: int

    @classmethod
    def of(cls, u: Tensor, states: int, cu_seqlens: Tensor | None) -> _Layout:
        batch, length, channels = u.shape
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        varlen = cu_seqlens is not None
        return cls._of(u.device, sequences, batch * length, length, channels, states, varlen, SHORTEST_SEGMENT)

    # Kept, as a model's layers ask for the same again and again: what is computed here shows beside small kernels.
    @classmethod
    @functools.lru_cache(maxsize=256)
    def _of(
        cls,
        device: torch.device,
        sequences: int,
        tokens: int,
        length: int,
        channels: int,
        states: int,
        varlen: bool,
        shortest: int,
    ) -> _Layout:
        blocks = cdiv(channels, LANES)
        segments, split = 1, 0
        # In a packed row any sequence may be the whole of it; segments that turn out to be empty cost next to nothing.
        few = _multiprocessors(device) * FEW_WARPS
        if 0 < sequences * blocks <= few and length >= 2 * shortest:
            split = max(shortest, cdiv(tokens * blocks, _multiprocessors(device) * WARPS_WANTED))
            split = cdiv(split, CHECKPOINT) * CHECKPOINT
            segments = cdiv(length, split)
        return cls(sequences, length, channels, states, varlen, segments, split)

    @functools.cached_property
    def blocks(self) -> int:
        return cdiv(self.channels, LANES)

    @functools.cached_property
    def N(self) -> int:
        return max(4, 1 << (self.states - 1).bit_length())

    def ring(self, *rows: Tensor | None, states: tuple[Tensor, ...]) -> int:
        """Bytes of a number of these rows, if the kernels can copy them ahead (`scan_ring`); else 0."""
        given = [x for x in rows if x is not None]
        item = given[0].element_size()
        if self.N != STATES.value or self.channels % LANES or not _copies(given[0].device):
            return 0
        aligned = all(x.element_size() == item and not _stride(x) * item % 16 for x in given)
        return item if aligned and not any(x.data_ptr() % 16 for x in (*given, *states)) else 0

    @property
    def checkpoints(self) -> int:
        """How many states are kept for backward, all sequences together."""
        if self.varlen:
            return self.length // CHECKPOINT + self.sequences
        return self.sequences * cdiv(self.length, CHECKPOINT)

    @functools.cached_property
    def arguments(self) -> dict[str, int]:
        return {
            "length": self.length,
            "channels": self.channels,
            "blocks": self.blocks,
            "offset": 0,
            "segments": self.segments,
            "split": self.split,
            "STATES": self.states,
            "N": self.N,
            "VARLEN": self.varlen,
            "MASK_D": self.channels % LANES != 0,
            "MASKED": self.channels % LANES != 0 or self.states != self.N,
            "num_warps": 1,
        }

    def new_states(self, like: Tensor, count: int) -> Tensor:
        return like.new_empty((count, self.channels, self.states), dtype=torch.float32)

    def new_scratch(self, like: Tensor, count: int) -> Tensor:
        """States as the kernels keep them for each other."""
        return like.new_empty((count, self.blocks, self.N * LANES), dtype=torch.float32)

    def per_token(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """B and C in float32, contiguous, with zeros for states that only the tiles have."""
        if self.states == self.N and _side_by_side(B, C):
            together = B.as_strided((2, *B.shape), (self.states, *B.stride()))
            made = torch.empty(together.shape, dtype=torch.float32, device=B.device).copy_(together)
            return made[0], made[1]
        more = self.N - self.states
        B, C = (F.pad(x.float(), (0, more)) if more else x.float() for x in (B, C))
        return B.contiguous(), C.contiguous()


def _side_by_side(B: Tensor, C: Tensor) -> bool:
    """Whether they are neighbours in the rows of one tensor, from which one kernel takes both."""
    alike = (B.shape, B.stride(), B.dtype) == (C.shape, C.stride(), C.dtype)
    one_tensor = alike and B.untyped_storage().data_ptr() == C.untyped_storage().data_ptr()
    return one_tensor and B.stride(-1) == 1 and C.storage_offset() == B.storage_offset() + B.shape[-1]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _copies(device: torch.device) -> bool:
    """Whether the GPU copies to shared memory by itself."""
    return bool(BY_PTX.value) and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _in_shared_memory(N: int, device: torch.device) -> bool:
    """Whether backward keeps its states there: as many as `shared_memory` has room for, on GPUs that have enough."""
    if not BY_PTX.value or CHECKPOINT // BACKWARD_GROUP * N * LANES * 4 > SHARED_BYTES:
        return False
    taken = SHARED_BYTES + ring_bytes(BACKWARD_GROUP, 4) + RESERVED_BYTES
    return _shared_memory(device) // taken >= SHARED_PROGRAMS


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes a multiprocessor."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def _rows(x: Tensor | None) -> Tensor | None:
    """x itself where it is rows at one distance from each other, else a copy that is."""
    if x is None:
        return None
    batch, length, _ = x.shape
    together = batch == 1 or length == 1 or x.stride(0) == length * x.stride(1)
    return x if x.stride(2) == 1 and together else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(1) if x.shape[1] > 1 else x.stride(0)


class _Scan(NamedTuple):
    """A forward's results, and what its backward reads."""

    y: Tensor
    final_state: Tensor | None
    layout: _Layout
    given: dict[str, Any]
    checkpoints: Tensor | None
    elapsed: Tensor | None


def _forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, lengths, resets, cu_seqlens, want_final,
    *, initial_index=None, out=None, save=False,
) -> _Scan:  # fmt: skip
    layout = _Layout.of(u, A.shape[1], cu_seqlens)
    u, delta, z = _rows(u), _rows(delta), _rows(z)
    B, C = layout.per_token(B, C)
    given = {
        "u": u,
        "delta": delta,
        "A": A.float().contiguous(),
        "B": B,
        "C": C,
        "D": None if D is None else D.float(),
        "z": z,
        "bias": None if delta_bias is None else delta_bias.float(),
        "resets": resets,
        "lengths": lengths,
        "cu_seqlens": cu_seqlens,
    }
    y = u.new_empty(u.shape) if out is None else out
    checkpoints = layout.new_scratch(u, layout.checkpoints) if save else None
    h0 = None if initial_state is None else initial_state.float().contiguous()
    last = layout.new_states(u, layout.sequences * layout.segments) if want_final else None
    elapsed = None
    with torch.cuda.device_of(u):
        if layout.segments > 1:
            (h0, elapsed), initial_index = _starts(layout, given, h0, initial_index), None
        _launch(
            scan_forward,
            layout,
            layout.sequences,
            given,
            h0=h0,
            index=initial_index,
            y=y,
            checkpoints=checkpoints,
            last=last,
            K=FORWARD_GROUP,
            CK=CHECKPOINT,
            HAS_H0=h0 is not None,
            INDEXED=initial_index is not None,
            SAVE=checkpoints is not None,
            LAST=want_final,
            RING=layout.ring(u, delta, z, states=(given["B"], given["C"])),
        )
    if last is not None and layout.segments > 1:
        last = last.unflatten(0, (layout.sequences, layout.segments))[:, -1].contiguous()
    return _Scan(y, last, layout, given, checkpoints, elapsed)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, lengths, resets, cu_seqlens, want_final, into):
        scan = _forward(
            *(u, delta, A, B, C, D, z, delta_bias, initial_state, lengths, resets, cu_seqlens, want_final),
            out=into[0],
            save=any(ctx.needs_input_grad),
        )
        ctx.layout, ctx.places = scan.layout, (gradient_place(u), gradient_place(z))
        ctx.dtypes = [None if x is None else x.dtype for x in (A, B, C, D, delta_bias, initial_state)]
        ctx.names = list(scan.given)
        ctx.save_for_backward(*scan.given.values(), scan.checkpoints, scan.elapsed)
        ctx.set_materialize_grads(False)
        return scan.y, scan.final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):  # type: ignore[override]  # mypy sees the decorator, not the method
        layout: _Layout = ctx.layout
        *saved, checkpoints, elapsed = ctx.saved_tensors
        given = dict(zip(ctx.names, saved, strict=True))
        u, delta, z = given["u"], given["delta"], given["z"]
        dy = torch.zeros_like(u) if dy is None else _rows(dy)
        _, _, needs_A, needs_B, needs_C, needs_D, _, needs_bias, needs_h0, *_ = ctx.needs_input_grad
        place_u, place_z = ctx.places
        du, ddelta = new_gradient(place_u, u, reads=dy), delta.new_empty(delta.shape)
        dz = None if z is None else new_gradient(place_z, z, reads=dy)
        tokens = u.shape[0] * u.shape[1]
        shares = u.new_empty((tokens, layout.blocks, 2, layout.N), dtype=torch.float32)
        dlast = None if d_final is None else d_final.float().contiguous()
        slots = layout.sequences * layout.segments
        dh0 = layout.new_states(u, slots) if needs_h0 else None
        sums: dict[str, Any] = {
            "dA": layout.new_states(u, 1).zero_() if needs_A else None,
            "dD": u.new_zeros(1, layout.blocks * LANES, dtype=torch.float32) if needs_D else None,
            "dbias": u.new_zeros(1, layout.blocks * LANES, dtype=torch.float32) if needs_bias else None,
        }
        with torch.cuda.device_of(u):
            if layout.segments > 1:
                dlast = _starts_backward(layout, given, dy, elapsed, dlast)
            at_once = max(1, BACKWARD_PROGRAMS * 16 // max(1, layout.blocks * layout.segments * max(16, layout.N)))
            at_once = min(at_once, layout.sequences)
            programs = at_once * layout.segments
            shared = _in_shared_memory(layout.N, u.device)
            kept = 0 if shared else programs * (CHECKPOINT // BACKWARD_GROUP)
            scratch = layout.new_scratch(u, kept)
            parts: dict[str, Any] = {
                name: None if x is None else x.new_empty(programs, *x.shape[1:]) for name, x in sums.items()
            }
            for offset in range(0, layout.sequences, max(1, at_once)):
                count = min(at_once, layout.sequences - offset)
                _launch(
                    scan_backward,
                    layout,
                    count,
                    given,
                    checkpoints=checkpoints,
                    dy=dy,
                    dlast=dlast,
                    scratch=scratch,
                    du=du,
                    ddelta=ddelta,
                    dz=dz,
                    dBC=shares,
                    dh0=dh0,
                    **parts,
                    offset=offset,
                    K=BACKWARD_GROUP,
                    CK=CHECKPOINT,
                    HAS_DLAST=dlast is not None,
                    GRAD_A=needs_A,
                    GRAD_D=needs_D,
                    GRAD_BIAS=needs_bias,
                    GRAD_H0=needs_h0,
                    SHARED=shared,
                    RING=layout.ring(u, delta, z, dy, states=(given["B"], given["C"])) if shared else 0,
                    maxnreg=BACKWARD_REGISTERS,
                )
                for name, total in sums.items():
                    if total is not None:
                        total += parts[name][: count * layout.segments].sum(0, keepdim=True)
        type_A, type_B, type_C, type_D, type_bias, type_h0 = ctx.dtypes
        dB = dC = None
        if needs_B or needs_C:
            with torch.cuda.device_of(u):
                dB, dC = (x.unflatten(0, u.shape[:2]) for x in sum_shares(shares, layout.states, (type_B, type_C)))
        return (
            du,
            ddelta,
            sums["dA"][0].to(type_A) if needs_A else None,
            dB if needs_B else None,
            dC if needs_C else None,
            sums["dD"][0, : layout.channels].to(type_D) if needs_D else None,
            dz,
            sums["dbias"][0, : layout.channels].to(type_bias) if needs_bias else None,
            None if dh0 is None else dh0.unflatten(0, (layout.sequences, layout.segments))[:, 0].to(type_h0),
            *[None] * 5,
        )


@functools.cache
def _names(kernel: Any) -> tuple[frozenset[str], tuple[str, ...]]:
    """A kernel's arguments, and those of them that are rows with a stride."""
    return frozenset(kernel.arg_names), tuple(name for name in ROWS if f"stride_{name}" in kernel.arg_names)


def _launch(kernel: Any, layout: _Layout, sequences: int, given: dict[str, Any], **more: Any) -> None:
    """Run a kernel over the segments of this many sequences, with those of the arguments that it has."""
    programs = layout.blocks * sequences * layout.segments
    if not programs:
        return
    names, rows = _names(kernel)
    # A tensor that is not there is a pointer that no flag lets the kernel follow.
    anything = given["A"]
    waves = cdiv(programs, _multiprocessors(anything.device))
    arguments = {**layout.arguments, "programs": programs, "waves": waves, **given, **more}
    for name in rows:
        arguments[f"stride_{name}"] = _stride(arguments[name])
    for flag, name in FLAGS.items():
        arguments[flag] = given[name] is not None
    kernel[(waves * cdiv(programs, waves),)](
        **{
            name: anything if x is None else x
            for name, x in arguments.items()
            if name in names or name in ("num_warps", "maxnreg")
        }
    )


def _starts(layout: _Layout, given: dict[str, Any], h0: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state that each segment starts from, and what decays a state over it."""
    ends = layout.new_states(given["u"], layout.sequences * layout.segments)
    elapsed = ends.new_empty(len(ends), layout.blocks, 2, LANES)
    ring = layout.ring(given["u"], given["delta"], states=(given["B"],))
    _launch(scan_ends, layout, layout.sequences, given, last=ends, elapsed=elapsed, K=FORWARD_GROUP, RING=ring)
    _chain(layout, given, elapsed, h0, index, ends, reverse=False)
    return ends, elapsed


def _starts_backward(
    layout: _Layout, given: dict[str, Any], dy: Tensor, elapsed: Tensor, dlast: Tensor | None
) -> Tensor:
    """The gradient of the state that each segment ends with."""
    gradients = layout.new_states(dy, layout.sequences * layout.segments)
    ring = layout.ring(dy, given["delta"], given["z"], states=(given["C"],))
    _launch(scan_ends_backward, layout, layout.sequences, given, dy=dy, dh0=gradients, K=FORWARD_GROUP, RING=ring)
    _chain(layout, given, elapsed, dlast, None, gradients, reverse=True)
    return gradients


def _chain(
    layout: _Layout,
    given: dict[str, Any],
    elapsed: Tensor,
    h0: Tensor | None,
    index: Tensor | None,
    last: Tensor,
    *,
    reverse: bool,
) -> None:
    scan_chain[(cdiv(layout.channels * layout.states, CHAIN_SIZE), layout.sequences)](
        A=given["A"],
        elapsed=elapsed,
        h0=last if h0 is None else h0,
        index=last if index is None else index,
        last=last,
        **{name: layout.arguments[name] for name in ("channels", "blocks", "segments", "STATES")},
        SIZE=CHAIN_SIZE,
        K=CHAIN_SEGMENTS,
        REVERSE=reverse,
        HAS_H0=h0 is not None,
        INDEXED=index is not None,
        num_warps=1,
    )
