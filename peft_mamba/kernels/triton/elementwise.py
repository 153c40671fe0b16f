"""Device functions that the Triton kernels of this package share, in float32.

Written in plain multiplications and exp2, so that compiled kernels and Triton's interpreter compute the same.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
    return tl.maximum(x, 0.0) + p * w, tl.where(x >= 0, 1.0, w) / (1.0 + w)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def halve(top, bottom, WIDTH: tl.constexpr):
    """Add up pairs of lanes and share the result: lanes whose bit WIDTH is 0 get that of `top`; both are [R, 32]."""
    lane = tl.arange(0, 32)
    upper = ((lane & WIDTH) != 0)[None, :]
    partner = tl.broadcast_to((lane ^ WIDTH)[None, :], top.shape)
    return tl.where(upper, bottom, top) + tl.gather(tl.where(upper, top, bottom), partner, 1)


@triton.jit
def narrow(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Add up the pairs of lanes that differ in bit WIDTH; of an [ROWS, 32] tile each keeps one half, if ROWS > 1.

    Giving half of the rows away at each exchange takes about one shuffle a row to sum over a warp, where a butterfly of
    each row takes five.
    """
    if ROWS > 1:
        top, bottom = tl.split(tl.permute(tl.reshape(x, [2, ROWS // 2, 32]), (1, 2, 0)))
        return halve(top, bottom, WIDTH)
    else:
        partner = tl.broadcast_to((tl.arange(0, 32) ^ WIDTH)[None, :], x.shape)
        return x + tl.gather(x, partner, 1)
