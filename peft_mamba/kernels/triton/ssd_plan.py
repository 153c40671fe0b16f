"""How a call of Mamba-2's scan lies over programs and tiles, and the sums and exponentials that its kernels share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from ..reference import kept_in
from . import ssd_chunks
from .common import Tensor, cdiv, interpreted, next_power_of_2

# Tokens a chunk, and at most so many columns of the state at a time. float32 operands take twice the room.
CHUNK, CHUNK_FLOAT32 = 64, 32
STATE_COLUMNS, STATE_COLUMNS_FLOAT32 = 128, 32
# Elements of a tile of the state, fewer columns of a wide head.
TILE = 64 * 128
# Tensor cores read narrow tiles of bfloat16 by descriptors with the highest bit set, to which ptxas (12.8) adds offsets
# wrongly now and then: to a register that holds something else. Tiles are no narrower than this, smaller heads or not.
LEAST, LEAST_FLOAT32 = 64, 16
# Warps and stages of the pipeline, for bfloat16 and for the others; and registers, where heads are no wider than 64:
# with 168 of them, three programs of four warps share a multiprocessor.
LAUNCH = {
    "states": ({"num_warps": 4, "num_stages": 3, "maxnreg": 168}, {"num_warps": 4, "num_stages": 2}),
    "states of a packed row": ({"num_warps": 4, "num_stages": 2, "maxnreg": 168}, {"num_warps": 4, "num_stages": 2}),
    "outputs": ({"num_warps": 4, "num_stages": 2, "maxnreg": 168}, {"num_warps": 4, "num_stages": 2}),
    "value_gradients": ({"num_warps": 4, "num_stages": 2}, {"num_warps": 4, "num_stages": 2}),
    "key_gradients": ({"num_warps": 4, "num_stages": 3}, {"num_warps": 8, "num_stages": 1}),
}
# Programs below which each takes fewer heads.
PROGRAMS = 384
# Heads of a program that takes sums of step sizes.
STEP_HEADS = 16
# Below this many sequences times heads, a sequence's state is divided among more programs.
FEW_SEQUENCES = 192
# Fewer sequences times heads are cut into as many segments, of no fewer chunks than this; not those of a packed row.
SEGMENTS_WANTED, LEAST_SPAN = 768, 32


class Plan(NamedTuple):
    """Sizes and constants of one call, as the kernels take them."""

    batch: int
    length: int
    heads: int
    head_size: int
    groups: int
    state_size: int
    sequences: int
    chunks: int  # of a row of the batch
    slots: int
    segments: int  # of a sequence
    span: int  # chunks of a segment
    dtype: torch.dtype
    described: dict  # how tokens are cut into rows, sequences and chunks
    constants: dict  # of what is multiplied; P covers a head, N is a tile of the state's columns

    @classmethod
    def of(
        cls,
        x: Tensor,
        B: Tensor,
        lengths: Tensor | None,
        seq_idx: Tensor | None,
        cu_seqlens: Tensor | None,
        restarts: bool = False,
    ):
        """restarts: every document in a chunk starts from the state before the chunk, not from nothing."""
        (batch, length, heads, head_size), (groups, state_size) = x.shape, B.shape[2:]
        bfloat16 = x.dtype == torch.bfloat16
        chunk = chunk_of(x)
        chunks = cdiv(length, chunk)
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        tf32 = x.dtype == torch.float16 or torch.backends.cuda.matmul.allow_tf32
        described = {
            "HAS_LENGTHS": lengths is not None,
            "HAS_SEQ_IDX": seq_idx is not None,
            "RESTARTS": restarts,
            "PACKED": cu_seqlens is not None,
            "Q": chunk,
        }
        least = LEAST if bfloat16 else LEAST_FLOAT32
        p = max(least, next_power_of_2(head_size))
        columns = STATE_COLUMNS if bfloat16 else STATE_COLUMNS_FLOAT32
        constants = {
            # The interpreter multiplies bfloat16's bits as if they were integers.
            "DOT": tl.bfloat16 if bfloat16 and not interpreted() else tl.float32,
            "INPUT": "tf32" if tf32 else "ieee",
            "P": p,
            "N": max(least, min(columns, TILE // p, next_power_of_2(state_size))),
            "HEAD_SIZE": head_size,
            "STATE_SIZE": state_size,
        }
        slots, segments = length // chunk + sequences, 1
        if cu_seqlens is None:
            slots = batch * chunks
            segments = max(1, min(cdiv(SEGMENTS_WANTED, batch * heads), chunks // LEAST_SPAN))
        span = cdiv(chunks, segments)
        return cls(
            *(batch, length, heads, head_size, groups, state_size, sequences, chunks, slots, cdiv(chunks, span), span),
            *(x.dtype, described, constants),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """What the kernels of a sequence take first."""
        return self.length, self.chunks, self.heads, self.group_heads

    @property
    def float32(self) -> bool:
        return self.dtype != torch.bfloat16

    @property
    def group_heads(self) -> int:
        return self.heads // self.groups

    def heads_and_blocks(self, most: int) -> tuple[int, int]:
        """Heads of a program, `most` of them at most, and how many programs a group's heads are for, all alike."""
        most = max(1, min(most, self.group_heads, self.slots * self.heads // PROGRAMS))
        blocks = cdiv(self.group_heads, most)
        return cdiv(self.group_heads, blocks), blocks

    def launch(self, kernel: str) -> dict:
        chosen = LAUNCH[kernel][self.float32]
        return chosen if self.constants["P"] <= 64 else {n: value for n, value in chosen.items() if n != "maxnreg"}

    def only(self, *names: str) -> dict:
        """Of what describes the rows, what a kernel asks for; chunks are described to all."""
        return {name: self.described[name] for name in ("PACKED", "Q", *names)}

    def state_tiles(self) -> tuple[dict, int]:
        """Tiles of the state that a program carries through a sequence or segment, small where there are few of these,
        and how many programs there are."""
        sequences = self.sequences * self.segments * self.heads
        few = sequences < FEW_SEQUENCES
        largest = (32, 32) if few else (64, 64 if self.float32 else 128)
        # Tensor cores multiply less than 64 rows by instructions that take no descriptors.
        least = LEAST_FLOAT32 if few or self.float32 else LEAST
        sizes = zip(largest, (self.head_size, self.state_size), strict=True)
        p, n = (max(least, min(most, next_power_of_2(size))) for most, size in sizes)
        tiles = cdiv(self.head_size, p) * cdiv(self.state_size, n)
        return self.only() | self.constants | {"P": p, "N": n, "SEGMENTED": self.segments > 1}, sequences * tiles

    def states(self, x: Tensor, direct: bool = False) -> Tensor:
        """Room for the state before each chunk; `direct`: before each but the first ones."""
        dtype = torch.float32 if self.float32 else torch.bfloat16
        slots = self.length // self.described["Q"] if direct else self.slots
        return torch.empty(slots, self.heads, self.head_size, self.state_size, dtype=dtype, device=x.device)

    def segment_states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Room for a float32 state of each segment and head, and for what is left of a state behind it."""
        segments = self.sequences * self.segments, self.heads
        ends = torch.empty(*segments, self.head_size, self.state_size, dtype=torch.float32, device=x.device)
        return ends, torch.empty(segments, dtype=torch.float32, device=x.device)

    def table(self, cu_seqlens: Tensor | None, memo: dict | None = None) -> Tensor | None:
        """Whose each slot is; `memo` keeps it for all calls that cut these sequences into such chunks."""
        if cu_seqlens is None:
            return None

        def make() -> Tensor:
            table = torch.empty(self.slots, dtype=torch.int32, device=cu_seqlens.device)
            ssd_chunks.chunk_table[(self.sequences,)](
                *(cu_seqlens, table, self.sequences, self.slots), Q=self.described["Q"], num_warps=1
            )
            return table

        return kept_in(memo, ("chunk_table", self.described["Q"], self.slots), make)


class Steps(NamedTuple):
    """What `ssd_chunks.steps` makes of dt and A: (slots, H, Q), but `through` (slots, H) and `documents` (slots, Q)."""

    step: Tensor
    sums: Tensor
    into: Tensor
    out: Tensor
    through: Tensor
    documents: Tensor | None

    @classmethod
    def of(cls, plan: Plan, dt, A, lengths, seq_idx, cu_seqlens, table):
        shape = (plan.slots, plan.heads, plan.described["Q"])
        precise = plan.dtype == torch.float32
        step, into, out = (torch.empty(shape, dtype=torch.float32, device=dt.device) for _ in range(3))
        sums = torch.empty(shape, dtype=torch.float64 if precise else torch.float32, device=dt.device)
        through = torch.empty(shape[:2], dtype=torch.float32, device=dt.device)
        documents = None
        if seq_idx is not None:
            documents = torch.empty(plan.slots, shape[2], dtype=torch.int32, device=dt.device)
        ssd_chunks.steps[(plan.slots, cdiv(plan.heads, STEP_HEADS))](
            *(dt, A, lengths, seq_idx, cu_seqlens, table, step, sums, into, out, through, documents),
            *(plan.length, plan.chunks, plan.heads),
            **plan.described,
            PRECISE=precise,
            H=STEP_HEADS,
        )
        return cls(step, sums, into, out, through, documents)


def chunk_of(x: Tensor) -> int:
    return CHUNK if x.dtype == torch.bfloat16 else CHUNK_FLOAT32


def strides_of(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]
