"""The scan of Mamba-1: mamba-ssm's CUDA kernels against ours, forward and forward with backward.

    python benchmarks/selective_scan.py
    python benchmarks/selective_scan.py --dtype fp32 --shape 16x2048x3072x16

Fresh random inputs, medians of `triton.testing.do_bench`, one process. Ours takes channel-last tensors, as the mixer
has them; the peer gets its own channel-first ones, without the copies that a mixer would need. The floors of the
forward: the bytes of u, delta, z and y over the memory's measured copy rate, and one exponential a state and token over
the rate of the units that compute it (16 a cycle and multiprocessor, at the clock that the driver states as highest).
"""

from __future__ import annotations

import argparse

import torch
from triton.testing import do_bench

from peft_mamba.kernels import select
from peft_mamba.kernels.triton.selective_scan import selective_scan

SHAPES = ["16x2048x3072x16", "128x512x3072x16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GOAL = 2.0
EXPONENTIALS_A_CYCLE = 16


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """u, delta, A, B, C, D, z, delta_bias; step sizes as a trained Mamba has them, about 0.01 to 0.1."""
    batch, length, channels, states = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda")

    z = normal(batch, length, 2 * channels).to(dtype)[..., channels:]  # half of in_proj's output
    return [
        normal(batch, length, channels).to(dtype),
        (0.5 * normal(batch, length, channels) - 3).to(dtype),
        -torch.exp(0.3 * normal(channels, states)),
        normal(batch, length, states).to(dtype),
        normal(batch, length, states).to(dtype),
        normal(channels),
        z,
        0.1 * normal(channels) - 1,
    ]


def times(function, tensors: list[torch.Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward, and of forward and backward with all gradients."""
    median = {"warmup": 20, "rep": 100, "return_mode": "median"}
    with torch.no_grad():
        forward = do_bench(lambda: function(*tensors), **median)
    leaves = [x.detach().requires_grad_() for x in tensors]
    gradient = torch.randn_like(function(*leaves))
    return forward, do_bench(lambda: torch.autograd.grad(function(*leaves), leaves, gradient), **median)


def copy_rate() -> float:
    """Bytes a millisecond, read and written."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / do_bench(lambda: y.copy_(x), return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", action="append", help="BATCHxLENGTHxCHANNELSxSTATES; default both of the goal's")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, torch {torch.__version__}, {options.dtype}", flush=True)
    rate = copy_rate()
    exponentials = EXPONENTIALS_A_CYCLE * device.multi_processor_count * device.clock_rate  # a millisecond
    peer_missing = ""
    try:
        select("cuda", "mamba_ssm")
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:
        peer_missing = str(error)
    for text in options.shape or SHAPES:
        shape = tuple(int(part) for part in text.split("x"))
        batch, length, channels, states = shape
        tensors = inputs(shape, DTYPES[options.dtype])
        ours = times(lambda *args: selective_scan(*args)[0], tensors)
        values = batch * length * channels
        floor = max(4 * values * tensors[0].element_size() / rate, values * states / exponentials)
        share = f"{floor / ours[0]:.0%} of the floor's rate"
        line = f"{text}: ours {ours[0]:.3f} ms forward ({share}), {ours[1]:.3f} with backward"
        if peer_missing:
            print(f"{line}; no peer: {peer_missing}", flush=True)
            continue
        first = [x.transpose(1, 2).contiguous() if x.ndim == 3 else x for x in tensors]
        peer = times(lambda *args: selective_scan_fn(*args, delta_softplus=True), first)
        ratios = [theirs / mine for theirs, mine in zip(peer, ours, strict=True)]
        print(
            f"{line}; mamba-ssm {peer[0]:.3f} and {peer[1]:.3f}: {ratios[0]:.2f}x and {ratios[1]:.2f}x (goal {GOAL})",
            flush=True,
        )


if __name__ == "__main__":
    main()
