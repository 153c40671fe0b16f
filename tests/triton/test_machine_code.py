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


def machine_code(*kernels: str) -> list[list[str]]:
    """Of each kernel, lines of PTX, and then of the assembler's code, see `compiled`."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"{__package__}.compiled", *kernels]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    codes = [code.splitlines() for code in done.stdout.split("=" * 40)[1:]]
    assert len(codes) == len(kernels)
    return codes


def test_what_a_product_reads_is_not_loaded_anew_while_it_runs():
    """Triton 3.6 loads two iterations ahead into two buffers, and one of them a product may still be reading."""
    for lines in machine_code("key_gradients:64:128", "key_gradients:128:64", "key_gradients:32:256"):
        runs, products, loads, early = False, 0, 0, []
        for number, line in enumerate(lines):
            if "wgmma.mma_async" in line:
                runs, products = True, products + 1
            elif re.search(r"wgmma\.wait_group\.sync\.aligned\s+0;", line):
                runs = False
            elif re.search(r"cp\.async\.c[ag]\.shared", line):
                loads += 1
                early += [number] * runs
        assert products > 8 and loads > 8, f"{lines[0]}: the kernel is not what this test is about"
        assert not early, f"{lines[0]}: {len(early)} loads into shared memory while a product runs"


def test_a_product_takes_its_operands_from_where_they_are():
    """Addresses within a tile are its descriptor, of 32 bits, and a constant of 64. ptxas 12.8 adds the constant's
    upper half to some register, in place of zero, where its highest bit is set, now and then."""
    for lines in machine_code("outputs:20:100", "outputs:16:32", "from_both_sides:32"):
        assert sum("HGMMA" in line for line in lines) > 8, f"{lines[0]}: the kernel is not what this test is about"
        zeros, wrong = {"URZ"}, []
        for line in lines:
            if match := UPPER_HALF.search(line):
                wrong += [line.strip()] * (match[1] not in zeros)
            if match := re.search(r"\b(?:U\w+|R2UR|S2UR)(?:\.\w+)* (UR\d+), ?(\w*)", line):
                zeros.discard(match[1])
                if "UMOV" in line and match[2] == "URZ":
                    zeros.add(match[1])
        assert not wrong, f"{lines[0]}: added to what is not zero: {wrong}"
        if "outputs" in lines[0]:
            constants = [line for line in lines if re.search(r"\b(?:or|add)\.[bs]64\b.*, -\d{19};", line)]
            assert not constants, f"{lines[0]}: descriptors with the highest bit set: {constants}"


def test_rows_of_the_selective_scan_are_copied_ahead_and_nothing_is_spilled():
    kernels = [f"{name}:{item}" for name in ("scan_forward", "scan_backward") for item in (2, 4)]
    for lines in machine_code(*kernels):
        assert sum("LDGSTS" in line for line in lines) > 3, f"{lines[0]}: nothing is copied to shared memory"
        waits = [line for line in lines if re.search(r"\bDEPBAR\.LE SB0, 0x0\b", line)]
        assert len(waits) == 1, f"{lines[0]}: each group of the loop is waited for, and nothing else"
        spilled = [line for line in lines if re.search(r"\b(?:STL|LDL)\b", line)]
        assert not spilled, f"{lines[0]}: registers go to memory: {spilled}"
