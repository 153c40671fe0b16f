"""The Triton kernels on a GPU, over a thousand shapes: outputs and all gradients against the float64 reference.

python -m pytest -n 8 tests/gpu/test_triton_kernels.py tests/triton

Each test is one set of compiled kernels that many drawn shapes run through. New tensors hold NaN, so that what a kernel
leaves unwritten shows.
"""

from __future__ import annotations

import functools
import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from peft_mamba import kernels

from ..triton.cases import ROWS, compare, conv_case, run_conv, run_scan, ssd_case

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
CONVOLUTIONS = [
    *((dtype, kind, 4, initial) for dtype in (FLOAT32, BFLOAT16) for kind in ROWS[:1] + ROWS[2:] for initial in (0, 1)),
    *((FLOAT16, kind, 4, True) for kind in ("whole", "packed")),
    *((FLOAT32, kind, width, True) for kind in ("documents", "packed") for width in (1, 2, 3, 8)),
]
SCANS = [
    *((dtype, kind, True) for dtype in (FLOAT32, BFLOAT16) for kind in ROWS),
    *((dtype, "whole", False) for dtype in (FLOAT32, FLOAT16, BFLOAT16)),
    *((FLOAT16, kind, True) for kind in ("padded", "documents", "packed")),
    (BFLOAT16, "packed", False),
]
CASES = {"convolution": 32, "scan": 24, "step": 16}  # shapes for each: 704 + 360 + 48


@pytest.fixture(autouse=True)
def true_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def draws(count: int, **sizes: tuple[int, int]) -> list[dict[str, int]]:
    """Sizes between bounds, both of them included, the ends first; the same in every run."""
    chance = random.Random(0)
    ends = [{name: pair[end] for name, pair in sizes.items()} for end in (0, 1)]
    return ends + [{name: chance.randint(*pair) for name, pair in sizes.items()} for _ in range(count - 2)]


@pytest.mark.parametrize("dtype, kind, width, initial", CONVOLUTIONS)
def test_convolution(dtype, kind, width, initial):
    run = functools.partial(run_conv, activation="silu" if width == 4 else None)
    for seed, sizes in enumerate(draws(CASES["convolution"], batch=(1, 5), length=(1, 300), channels=(1, 21))):
        torch.manual_seed(seed)
        channels = 16 * sizes["channels"] if seed % 4 else sizes["channels"]  # now and then no row is aligned
        inputs, rows = conv_case(
            kind, sizes["batch"], sizes["length"], channels, width, bias=width != 3, initial=initial
        )
        compare(run, "causal_conv1d", inputs, rows, dtype, "cuda")


@pytest.mark.parametrize("dtype, kind, initial", SCANS)
def test_scan(dtype, kind, initial, monkeypatch):
    from peft_mamba.kernels.triton import ssd_plan

    for seed, sizes in enumerate(draws(CASES["scan"], batch=(1, 4), length=(1, 260), heads=(1, 6))):
        torch.manual_seed(seed)
        monkeypatch.setattr(ssd_plan, "PROGRAMS", 1 if seed % 2 else 2**31)  # all heads in a program, and one
        monkeypatch.setattr(ssd_plan, "FEW_SEQUENCES", 0 if seed % 2 else 2**31)  # large tiles of the state, small ones
        groups = 1 if seed % 3 else sizes["heads"]
        head_size, state_size = (64, 128) if seed % 6 else (20, 100)
        inputs, rows = ssd_case(
            kind, sizes["batch"], sizes["length"], sizes["heads"], groups, head_size, state_size, initial=initial
        )
        compare(run_scan, "ssd", inputs, rows, dtype, "cuda")


@pytest.mark.parametrize("kind", ["documents", "packed"])
@pytest.mark.parametrize(
    "heads, head_size, state_size", [(4, 16, 16), (8, 16, 32), (4, 32, 64), (4, 32, 256), (4, 128, 64)]
)
def test_scan_of_other_sizes(heads, head_size, state_size, kind):
    for dtype in (FLOAT32, BFLOAT16):
        for seed, length in enumerate((1, 64, 150)):
            torch.manual_seed(seed)
            groups = 1 if seed % 2 else 2
            sizes = (2, length, heads, groups, head_size, state_size)
            for initial in (True, False):
                compare(run_scan, "ssd", *ssd_case(kind, *sizes, initial=initial), dtype, "cuda")


@pytest.mark.parametrize("dtype, kind", [(FLOAT32, "padded"), (FLOAT16, "whole"), (BFLOAT16, "documents")])
def test_long_scans(dtype, kind):
    """Few sequences, which are cut into segments."""
    from peft_mamba.kernels.triton.ssd_plan import Plan

    for seed, (batch, length, heads) in enumerate([(1, 64 * 70, 3), (2, 64 * 150 + 7, 2), (1, 64 * 100, 5)]):
        torch.manual_seed(seed)
        inputs, rows = ssd_case(kind, batch, length, heads, 1, 64, 128, initial=seed > 0)
        inputs["dt"] *= 1e-3 if seed else 1  # what passes through many chunks, or next to nothing
        x, B = (inputs[name].to("meta", dtype) for name in "xB")
        assert Plan.of(x, B, None, None, None).segments > 1
        compare(run_scan, "ssd", inputs, rows, dtype, "cuda")


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_step(dtype):
    """Without gradients a single token takes a kernel of its own; with them it does not."""
    for seed, sizes in enumerate(draws(CASES["step"], batch=(1, 300), heads=(1, 6))):
        torch.manual_seed(seed)
        inputs, rows = ssd_case("padded", sizes["batch"], 1, sizes["heads"], 1, 64, 128)
        compare(run_scan, "ssd", inputs, rows, dtype, "cuda", frozen=tuple(inputs))


def test_thousands_of_sequences():
    torch.manual_seed(0)
    run = functools.partial(run_conv, activation="silu")
    inputs, _ = conv_case("whole", 3000, 5, 16, 4)
    compare(run, "causal_conv1d", inputs, {}, FLOAT32, "cuda")
    inputs, _ = ssd_case("whole", 3000, 5, 2, 1, 64, 128)
    compare(run_scan, "ssd", inputs, {}, BFLOAT16, "cuda")
    # The same rows laid end to end are the same sequences.
    cu_seqlens = torch.arange(0, 15001, 5, dtype=torch.int32, device="cuda")
    given = {name: tensor.to("cuda", FLOAT32) for name, tensor in inputs.items()}
    packed = {n: t if n in ("A", "D", "initial_state") else t.flatten(0, 1)[None] for n, t in given.items()}
    operation = kernels.select("cuda", "triton").ssd
    for apart, together in zip(
        run_scan(operation, **given), run_scan(operation, **packed, cu_seqlens=cu_seqlens), strict=True
    ):
        assert torch.equal(apart.flatten(), together.flatten())


def test_more_than_two_billion_elements():
    """Offsets beyond 32 bits, in the last rows of a batch."""
    free, _ = torch.cuda.mem_get_info()
    x = torch.empty(66, 16384, 2048, dtype=BFLOAT16, device="cuda") if free > 30e9 else None
    if x is None:
        pytest.skip("needs 30 GB of GPU memory")
    torch.manual_seed(0)
    x[-1] = torch.randn(16384, 2048, device="cuda")
    weight = torch.randn(2048, 4, device="cuda")
    operation = kernels.select("cuda", "triton").causal_conv1d
    y = operation(x, weight, activation="silu")
    assert torch.equal(y[-1:], operation(x[-1:], weight, activation="silu"))
    heads = (66, 16384, 32, 64)
    groups = torch.randn(66, 16384, 1, 16, dtype=BFLOAT16, device="cuda")
    dt, A = torch.rand(66, 16384, 32, device="cuda"), -torch.rand(32, device="cuda")
    operation = kernels.select("cuda", "triton").ssd
    y, _ = operation(x.view(heads), dt, A, groups, groups)
    last, _ = operation(x.view(heads)[-1:], dt[-1:], A, groups[-1:], groups[-1:])
    assert torch.equal(y[-1:], last)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_same_inputs_same_bits(dtype):
    torch.manual_seed(0)
    for case, run, name in (
        (conv_case("packed", 1, 2000, 96, 4), functools.partial(run_conv, activation="silu"), "causal_conv1d"),
        (ssd_case("packed", 1, 2000, 8, 1, 64, 128), run_scan, "ssd"),
    ):
        inputs, rows = case
        given = {each: tensor.to("cuda", dtype).requires_grad_() for each, tensor in inputs.items()}
        rows = {each: tensor.cuda() for each, tensor in rows.items()}
        results = []
        for _ in range(2):
            outputs = run(getattr(kernels.select("cuda", "triton"), name), **given, **rows)
            loss = sum(output.float().square().sum() for output in outputs)
            results.append([*outputs, *torch.autograd.grad(loss, list(given.values()))])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
