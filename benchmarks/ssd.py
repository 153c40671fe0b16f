"""Mamba-2's scan on one GPU: mamba-ssm's Triton SSD, flash-linear-attention's and ours, same inputs, one process.

    python benchmarks/ssd.py [--batch 16 --length 2048 --heads 48 --head-size 64 --state-size 128 --dtype bf16]

x, B and C are slices of the convolution's output, as a mixer hands them over. Medians of triton.testing.do_bench for
forward, and for forward and backward. The share of the floor is what reading and writing inputs and outputs once takes
at --bandwidth. --packed lays the tokens end to end in sequences of about 100 tokens, which mamba-ssm takes as seq_idx.
"""

from __future__ import annotations

import functools
import itertools
import math

import click
import torch
import triton
from triton.testing import do_bench

from peft_mamba import kernels
from peft_mamba.kernels.triton import ssd as module
from peft_mamba.kernels.triton import ssd_backward, ssd_chunks, ssd_forward, ssd_plan, ssd_segments

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = ((16, 2048), (128, 512), (1, 32768))


def flash_linear_attention():
    """The same scan through chunk_simple_gla: q = C, k = B for every head, v = x dt, g = dt A."""
    from fla.ops.simple_gla import chunk_simple_gla

    def scan(x, dt, A, B, C, D, *, seq_idx=None, cu_seqlens=None):
        q, k = (t.expand(*t.shape[:2], x.shape[2], t.shape[3]) for t in (C, B))
        v, g = (x * dt[..., None]).to(x.dtype), dt * A
        y, _ = chunk_simple_gla(q, k, v, g=g, scale=1.0, cu_seqlens=cu_seqlens)
        return y + x * D.to(x.dtype)[:, None], None

    return scan


def implementations() -> dict:
    """Name to operation, or to why there is none."""
    found = {}
    for name in ("mamba_ssm", "triton"):
        operation, problem = kernels.choice._load(name, "ssd")
        found[name] = operation or problem
    try:
        found["fla"] = flash_linear_attention()
    except Exception as error:  # a peer that is not there or broken
        found["fla"] = f"{type(error).__name__}: {error}"
    return found


def milliseconds(operation, tensors, dy) -> list[float]:
    """Of the forward, and of forward and backward."""

    def both():
        return torch.autograd.grad(operation()[0], tensors, dy)

    return [do_bench(work, warmup=50, rep=200, return_mode="median") for work in (operation, both)]


def sweep(tensors, dy, described: dict) -> None:
    """Constants of ours: for each size of chunks, tiles and blocks the fastest launch of every kernel."""
    for chunk, columns, heads, few in itertools.product((64, 128), (128, 64), (16, 12, 8), (ssd_plan.FEW_SEQUENCES, 0)):
        ssd_plan.CHUNK, ssd_plan.STATE_COLUMNS, ssd_plan.FEW_SEQUENCES = chunk, columns, few
        module.OUTPUT_HEADS = module.GRADIENT_HEADS = heads
        best: dict[str, tuple[float, str]] = {}
        for warps, stages, registers in itertools.product((4, 8), (1, 2, 3), (None, 128, 168)):
            launch = {"num_warps": warps, "num_stages": stages, **({"maxnreg": registers} if registers else {})}
            ssd_plan.LAUNCH = dict.fromkeys(ssd_plan.LAUNCH, (launch, launch))
            try:
                found = kernel_times(tensors, dy, described)
            except triton.runtime.errors.OutOfResources:
                continue
            for name, time in found.items():
                how = f"{warps} warps, {stages} stages, {registers or 'any'} registers"
                best[name] = min(best.get(name, (math.inf, "")), (time, how))
        total = sum(time for time, _ in best.values())
        print(f"  chunk {chunk}, columns {columns}, heads {heads}, few sequences {few}: {total:.3f} ms", flush=True)
        for name, (time, how) in best.items():
            print(f"    {name:16} {time:.3f} ms with {how}")


def kernel_times(tensors, dy, described: dict) -> dict[str, float]:
    """Milliseconds of each of our kernels in a forward and backward, the mean of five."""
    for runs in (2, 5):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(runs):
                torch.autograd.grad(module.ssd(*tensors, **described)[0], tensors, dy)
            torch.cuda.synchronize()
    times = {event.key: event.device_time_total / 5e3 for event in profile.key_averages()}
    ours = {name for each in (ssd_chunks, ssd_forward, ssd_backward, ssd_segments) for name in vars(each)}
    return {name: time for name, time in times.items() if name in ours}


@click.command()
@click.option("--batch", type=int, help="Default, with --length: 16 x 2048, 128 x 512 and 1 x 32768.")
@click.option("--length", type=int)
@click.option("--heads", type=int, default=48, show_default=True)
@click.option("--groups", type=int, default=1, show_default=True)
@click.option("--head-size", type=int, default=64, show_default=True)
@click.option("--state-size", type=int, default=128, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@click.option("--bandwidth", type=float, default=4.3, show_default=True, help="Of the memory, TB/s; 4.3 on an H200.")
@click.option("--packed", is_flag=True)
@click.option("--sweep", "tune", is_flag=True, help="Try other constants of ours, and show the time of each kernel.")
def main(batch, length, heads, groups, head_size, state_size, dtype, bandwidth, packed, tune) -> None:
    kind = DTYPES[dtype]
    operations = implementations()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}, H {heads}, P {head_size}, N {state_size}"
    )
    for name, operation in operations.items():
        if isinstance(operation, str):
            print(f"{name}: {operation}")
    for rows, tokens in [(batch, length)] if batch and length else SHAPES:
        widths = [heads * head_size, groups * state_size, groups * state_size]
        if packed:
            rows, tokens = 1, rows * tokens
        u = torch.randn(rows, tokens, sum(widths), device="cuda", dtype=kind)
        x, B, C = u.split(widths, dim=-1)
        x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
        dt = torch.nn.functional.softplus(torch.randn(rows, tokens, heads, device="cuda") - 3)
        A, D = -torch.rand(heads, device="cuda") * 15 - 1, torch.randn(heads, device="cuda")
        tensors = [t.detach().requires_grad_() for t in (x, dt, A, B, C, D)]
        dy = torch.randn(rows, tokens, heads, head_size, device="cuda", dtype=kind)
        described: dict[str, dict] = {name: {} for name in operations}
        if packed:
            cuts = torch.arange(0, tokens, 100, dtype=torch.int32, device="cuda")
            cu_seqlens = torch.cat([cuts, cuts.new_tensor([tokens])])
            described = {name: {"cu_seqlens": cu_seqlens} for name in operations}
            described["mamba_ssm"] = {"seq_idx": (torch.arange(tokens, device="cuda", dtype=torch.int32) // 100)[None]}
        size = kind.itemsize * rows * tokens
        floors = (
            size * (2 * widths[0] + 2 * widths[1]) / bandwidth / 1e9,
            size * (5 * widths[0] + 6 * widths[1]) / bandwidth / 1e9,
        )
        print(f"B {rows}, L {tokens}{', sequences of 100' if packed else ''}")
        if tune:
            sweep(tensors, dy, described["triton"])
            continue
        times: dict[str, list[float]] = {}
        for name, operation in operations.items():
            if isinstance(operation, str):
                continue
            times[name] = milliseconds(functools.partial(operation, *tensors, **described[name]), tensors, dy)
            ratios = ""
            if name != "triton" and "triton" in times:
                ratios = (
                    f" (ours {times[name][0] / times['triton'][0]:.2f}x, {times[name][1] / times['triton'][1]:.2f}x)"
                )
            elif name == "triton":
                peer = times.get("mamba_ssm")
                if peer:
                    ratios = f", {peer[0] / times[name][0]:.2f}x and {peer[1] / times[name][1]:.2f}x mamba-ssm"
                ratios += f", {floors[0] / times[name][0]:.0%} and {floors[1] / times[name][1]:.0%} of the floors"
            print(
                f"  {name:10} forward {times[name][0]:.3f} ms, with backward {times[name][1]:.3f} ms{ratios}",
                flush=True,
            )


if __name__ == "__main__":
    main()
