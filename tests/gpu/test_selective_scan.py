"""The Triton scan on a GPU, 30 drawn shapes for each kind of call: pytest -n 8 tests/gpu/test_selective_scan.py"""

import random

import pytest
import torch

from ..triton.scan_cases import Case, check, draw, run

KINDS = [
    (dtype, states, rows, stateful)
    for dtype, states in [(torch.float32, 16), (torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 4)]
    for rows in ("plain", "seq_idx", "lengths", "packed")
    for stateful in (False, True)
] + [(torch.bfloat16, states, "packed", True) for states in (5, 32, 64, 128, 256)]


@pytest.fixture(scope="module")
def scan():
    return pytest.importorskip("peft_mamba.kernels.triton.selective_scan")


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel does not write is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype, states, rows, stateful", KINDS)
def test_drawn_shapes(scan, poisoned, monkeypatch, dtype, states, rows, stateful):
    rng = random.Random(f"{dtype}{states}{rows}{stateful}")
    for seed in range(30):
        monkeypatch.setattr(scan, "_copies", lambda _, ahead=seed % 2: bool(ahead))  # copied ahead, and loaded at use
        monkeypatch.setattr(scan, "SHARED_PROGRAMS", 2**31 if seed // 2 % 2 else 1)  # backward in global memory, shared
        length = rng.choice([0, 1, 2, 3, 31, 32, 33, 64, 97, rng.randint(1, 130)])
        channels = rng.choice([1, 31, 32, 64, 96, 100])
        check(
            scan.selective_scan,
            Case(rng.randint(1, 4), length, channels, states, dtype, rows, stateful, strided=seed % 3 == 0, seed=seed),
            "cuda",
        )


@pytest.mark.parametrize("rows", ["plain", "seq_idx", "packed"])
def test_long_sequences_in_segments(scan, poisoned, rows):
    check(scan.selective_scan, Case(2, 1500, 64, 16, rows=rows, stateful=True), "cuda")


def test_the_same_bits_every_time(scan):
    tensors, rows = draw(Case(4, 400, 96, dtype=torch.bfloat16, rows="seq_idx", stateful=True), "cuda")
    first = run(scan.selective_scan, tensors, rows, True)
    for _ in range(3):
        again = run(scan.selective_scan, tensors, rows, True)
        assert all(torch.equal(again[name], first[name]) for name in first)
