"""Device functions that the Triton kernels of this package share, in float32.

Written in plain multiplications and exp2, so that compiled kernels and Triton's interpreter compute the same.
"""

import triton
import triton.language as tl

from .common import BY_PTX

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def reciprocal(x):
    """1 / x for x ≥ 1, to the last bit but one, in one instruction where a division takes several."""
    if BY_PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def softplus_and_slope(x):
    """log(1 + exp(x)), to 1e-7 relative also where it is small, and its derivative sigmoid(x).

    max(x, 0) + log1p(w) with w = exp(-|x|) in (0, 1]: log(1 + w) would round away the small step sizes that a Mamba
    starts with. The polynomial interpolates log1p(w) / w at Chebyshev nodes of [0, 1]; its relative error is 3e-8.
    """
    w = tl.exp2(-tl.abs(x) * LOG2E)
    p = w * 0.005253457796023025 - 0.029588507388484703
    p = p * w + 0.0783616680109936
    p = p * w - 0.13674769704837997
    p = p * w + 0.19111431080246266
    p = p * w - 0.2484436989238459
    p = p * w + 0.33319271342491946
    p = p * w - 0.49999501516786815
    p = p * w + 0.999999970540657
    return tl.maximum(x, 0.0) + p * w, tl.where(x >= 0, 1.0, w) * reciprocal(1.0 + w)


@triton.jit
def sigmoid(x):
    """To 1e-7 relative, and 0 below -87; exp2 that flushes to zero is one instruction, not four."""
    if BY_PTX:
        w = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -LOG2E], tl.float32, True, 1)
    else:
        w = tl.exp2(x * -LOG2E)
    return reciprocal(1.0 + w)


@triton.jit
def finished(x):
    """x, a sum of products in float32 that has been computed when this is.

    A product whose result only the next iteration of a loop adds to is left running, and what is loaded ahead may by
    then be on its way into the memory that it reads: Triton 3.6 allows for that, but not where something other than
    products reads the same tile.
    """
    if BY_PTX:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return x
