"""Which program of the selective scan does what.

A program, one warp, owns 32 channels of one segment of one sequence and walks through its tokens. Tokens are rows:
(T, D) with the stride of a row for u, delta, z and their gradients, (T, N) in float32 for B and C.
"""

import inspect

import triton
import triton.language as tl

from .elementwise import softplus_and_slope
from .scan_memory import load

# Added to the exponent of a decay where a document starts: exp2 of it is 0.
RESET = tl.constexpr(-1.0e30)
# Triton compiles a kernel anew where a number is 1, or it or a pointer is a multiple of 16. Only pointers to B, C and
# states gain by that, and lengths that differ from batch to batch would each cost seconds.
NUMBERS = [
    *("length", "channels", "blocks", "offset", "segments", "split", "waves", "programs"),
    *("stride_u", "stride_delta", "stride_z", "stride_y"),
    *("stride_dy", "stride_du", "stride_ddelta", "stride_dz"),
]
POINTERS = [
    *("u", "delta", "z", "y", "dy", "du", "ddelta", "dz", "dBC", "D", "bias", "dD", "dbias", "elapsed"),
    *("resets", "lengths", "cu_seqlens", "index"),
]


def kernel(function):
    """triton.jit for the kernels of the scan."""
    names = inspect.signature(function).parameters
    return triton.jit(
        do_not_specialize=[name for name in NUMBERS if name in names],
        do_not_specialize_on_alignment=[name for name in POINTERS if name in names],
    )(function)


@triton.jit
def place(waves):
    """The program's number, such that those which start out on one multiprocessor are neighbours.

    Programs are dealt out one by one, so that every (programs / waves)-th is on the same one.
    """
    across = tl.num_programs(0) // waves
    return tl.program_id(0) % across * waves + tl.program_id(0) // across


@triton.jit
def program_of(cu_seqlens, length, blocks, offset, segments, split, waves, VARLEN: tl.constexpr):
    """What this program is about: (block of channels, sequence, segment, the sequence's first row, tokens).

    The programs of a segment are neighbours, since they read the same B and C. `offset` is the launch's first sequence.
    """
    program = place(waves)
    block = program % blocks
    index = program // blocks
    sequence = (offset + index // segments).to(tl.int64)
    segment = index % segments
    if VARLEN:
        first = tl.load(cu_seqlens + sequence).to(tl.int64)
        tokens = (tl.load(cu_seqlens + sequence + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = sequence * length
        tokens = length
    if segments > 1:
        tokens = tl.minimum(tokens - segment * split, split)
    return block, sequence, segment, first, tokens


@triton.jit
def first_checkpoint(sequence, segment, first, length, split, CK: tl.constexpr, VARLEN: tl.constexpr):
    """Number of a segment's first checkpoint; a sequence that starts at row r has those from r // CK + sequence on."""
    if VARLEN:
        return first // CK + sequence + segment * (split // CK)
    else:
        return sequence * tl.cdiv(length, CK) + segment * (split // CK)


@triton.jit
def channels_of(
    bias, lengths, block, sequence, segment, split, channels,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, MASK_D: tl.constexpr,
):  # fmt: skip
    """What a program holds throughout: (channels, which of them there are, bias, limit).

    Tokens of the segment at and after `limit` are padding.
    """
    d = block * 32 + tl.arange(0, 32)
    d_ok = d < channels
    bias_d = 0.0
    if HAS_BIAS:
        bias_d = load(bias + d, d_ok, MASK_D)
    limit = 0
    if HAS_LENGTHS:
        limit = tl.load(lengths + sequence).to(tl.int32) - segment * split
    return d, d_ok, bias_d, limit


@triton.jit
def penalty(resets, t, HAS_RESETS: tl.constexpr):
    penalty = 0.0
    if HAS_RESETS:
        penalty = tl.where(tl.load(resets + t) != 0, RESET, 0.0)
    return penalty


@triton.jit
def step_size(raw, t, limit, HAS_LENGTHS: tl.constexpr):
    """Step size and its derivative; both zero on padding, which leaves state and gradient as they are."""
    dd, slope = softplus_and_slope(raw)
    if HAS_LENGTHS:
        dd = tl.where(t < limit, dd, 0.0)
        slope = tl.where(t < limit, slope, 0.0)
    return dd, slope
