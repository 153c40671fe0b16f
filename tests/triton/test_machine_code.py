"""What kernels are compiled to for sm_90, for which no GPU is needed: of races and wrong addresses, results show little
and late."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

# Beside the bits of how a tile is swizzled, the upper half of an operand's descriptor is the distance of its groups.
UPPER_HALF = re.compile(r"UIADD3\.X UR\d+, (UR\w+), -?0x(?:40000040|7fffffe0|3ffffff0)\b")


def machine_code(kernel: str, *sizes: int) -> list[str]:
    """Lines of PTX, and then of the assembler's code, see `compiled`."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"{__package__}.compiled", kernel, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(("head_size", "state_size"), [(64, 128), (128, 64), (32, 256)])
def test_what_a_product_reads_is_not_loaded_anew_while_it_runs(head_size, state_size):
    """Triton 3.6 loads two iterations ahead into two buffers, and one of them a product may still be reading."""
    runs, products, loads, early = False, 0, 0, []
    for number, line in enumerate(machine_code("key_gradients", head_size, state_size)):
        if "wgmma.mma_async" in line:
            runs, products = True, products + 1
        elif re.search(r"wgmma\.wait_group\.sync\.aligned\s+0;", line):
            runs = False
        elif re.search(r"cp\.async\.c[ag]\.shared", line):
            loads += 1
            early += [number] * runs
    assert products > 8 and loads > 8, "the kernel is not what this test is about"
    assert not early, f"{len(early)} loads into shared memory while a product runs"


@pytest.mark.parametrize(("kernel", "sizes"), [("outputs", (20, 100)), ("from_both_sides", (32,))])
def test_a_product_takes_its_operands_from_where_they_are(kernel, sizes):
    """Addresses within a tile are its descriptor, of 32 bits, and a constant of 64. ptxas 12.8 adds the constant's
    upper half to some register, in place of zero, where its highest bit is set, now and then."""
    lines = machine_code(kernel, *sizes)
    assert sum("HGMMA" in line for line in lines) > 8, "the kernel is not what this test is about"
    zeros, wrong = {"URZ"}, []
    for line in lines:
        if match := UPPER_HALF.search(line):
            wrong += [line.strip()] * (match[1] not in zeros)
        if match := re.search(r"\b(?:U\w+|R2UR|S2UR)(?:\.\w+)* (UR\d+), ?(\w*)", line):
            zeros.discard(match[1])
            if "UMOV" in line and match[2] == "URZ":
                zeros.add(match[1])
    assert not wrong, f"added to what is not zero: {wrong}"
    if kernel == "outputs":
        constants = [line for line in lines if re.search(r"\b(?:or|add)\.[bs]64\b.*, -\d{19};", line)]
        assert not constants, f"descriptors with the highest bit set: {constants}"


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("kernel", ["scan_forward", "scan_backward"])
def test_rows_of_the_selective_scan_are_copied_ahead_and_nothing_is_spilled(kernel, item):
    lines = machine_code(kernel, item)
    assert sum("LDGSTS" in line for line in lines) > 3, "nothing is copied to shared memory"
    assert sum(bool(re.search(r"\bDEPBAR\.LE SB0, 0x0\b", line)) for line in lines) == 1, "none waits, or all do"
    assert not [line for line in lines if re.search(r"\b(?:STL|LDL)\b", line)], "registers are spilled to memory"
