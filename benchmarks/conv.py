"""Causal convolution with SiLU on one GPU: causal-conv1d and our Triton kernel, on the same inputs in one process.

    python benchmarks/conv.py [--batch 16 --length 2048 --channels 3072 --width 4 --dtype bf16]

The input is the half of in_proj's output that a mixer hands over, channel-last. Medians of triton.testing.do_bench for
the forward, for forward and backward with frozen weights (LoRA) and with all gradients; the share of the floor is what
reading and writing each value once takes at --bandwidth.
"""

from __future__ import annotations

import click
import torch
from triton.testing import do_bench

from peft_mamba import kernels

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = ((16, 2048), (128, 512))


def inputs(batch: int, length: int, channels: int, width: int, dtype: torch.dtype, trained: bool):
    projected = torch.randn(batch, length, 2 * channels, device="cuda", dtype=dtype)
    x = projected[..., :channels].requires_grad_()
    weight, bias = (
        torch.randn(*size, device="cuda", requires_grad=trained) for size in ((channels, width), (channels,))
    )
    return x, weight, bias


def work(operation, tensors, dy):
    """(forward, forward and backward) of an operation as functions without arguments."""
    wanted = [tensor for tensor in tensors if tensor.requires_grad]

    def forward():
        return operation(*tensors, activation="silu")

    def both():
        return torch.autograd.grad(forward(), wanted, dy)

    return forward, both


def milliseconds(function) -> float:
    return do_bench(function, warmup=50, rep=200, return_mode="median")


@click.command()
@click.option("--batch", type=int, help="Default, with --length: 16 x 2048 and 128 x 512.")
@click.option("--length", type=int)
@click.option("--channels", type=int, default=3072, show_default=True)
@click.option("--width", type=int, default=4, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@click.option("--bandwidth", type=float, default=4.3, show_default=True, help="Of the memory, TB/s; 4.3 on an H200.")
def main(batch, length, channels, width, dtype, bandwidth) -> None:
    problem = kernels.choice._load("mamba_ssm", "causal_conv1d")[1]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}, D {channels}, K {width}")
    if problem:
        print(f"causal-conv1d: {problem}")
    for rows, tokens in [(batch, length)] if batch and length else SHAPES:
        print(f"B {rows}, L {tokens}")
        elements = rows * tokens * channels * DTYPES[dtype].itemsize
        # Forward reads x and writes y; backward reads x and dy and writes dx.
        for trained, kind, passes in ((False, "forward", 2), (False, "LoRA", 5), (True, "all gradients", 5)):
            tensors = inputs(rows, tokens, channels, width, DTYPES[dtype], trained)
            dy = torch.randn(rows, tokens, channels, device="cuda", dtype=DTYPES[dtype])
            times = {}
            for name in ("mamba_ssm", "triton") if not problem else ("triton",):
                operation = kernels.choice._load(name, "causal_conv1d")[0]
                times[name] = milliseconds(work(operation, tensors, dy)[kind != "forward"])
            floor = passes * elements / bandwidth / 1e9
            peer = f"causal-conv1d {times['mamba_ssm']:.3f} ms, " if not problem else ""
            ratio = f"{times['mamba_ssm'] / times['triton']:.2f}x, " if not problem else ""
            print(
                f"  {kind:14} {peer}ours {times['triton']:.3f} ms, {ratio}{floor / times['triton']:.0%} of the floor "
                f"({floor:.3f} ms)",
                flush=True,
            )


if __name__ == "__main__":
    main()
