"""What a kernel is compiled to for sm_90, for which no GPU is needed: of races, results show little and late."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

# In a process of its own, where Triton compiles and does not interpret.
COMPILES = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peft_mamba.kernels.triton import ssd, ssd_backward
import triton.language as tl

kernel = ssd_backward.key_gradients
head_size, state_size = map(int, sys.argv[1:])
constants = dict(PACKED=True, DOT=tl.bfloat16, INPUT="ieee", Q=ssd.CHUNK, P=max(16, ssd.next_power_of_2(head_size)))
constants |= dict(N=min(128, ssd.TILE // constants["P"], ssd.next_power_of_2(state_size)))
constants |= dict(HEAD_SIZE=head_size, STATE_SIZE=state_size)
half = {"x", "B", "C", "dy", "h", "g", "shared"}
floats = {"step", "into", "out", "partial", "reading", "leaving", "both"}
types = {name: "*bf16" for name in half} | {name: "*fp32" for name in floats} | {"cu_seqlens": "*i32", "table": "*i32"}
signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
strides = [name for name in kernel.arg_names if name in types or name.endswith(("_row", "_token", "_head", "_group"))]
aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in strides}
source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
options = ssd.LAUNCH["key_gradients"][0]
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


@pytest.mark.parametrize(("head_size", "state_size"), [(64, 128), (128, 64), (32, 256)])
def test_what_a_product_reads_is_not_loaded_anew_while_it_runs(head_size, state_size):
    """Triton 3.6 loads two iterations ahead into two buffers, and one of them a product may still be reading."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILES, str(head_size), str(state_size)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    runs, products, loads, early = False, 0, 0, []
    for number, line in enumerate(done.stdout.splitlines()):
        if "wgmma.mma_async" in line:
            runs, products = True, products + 1
        elif re.search(r"wgmma\.wait_group\.sync\.aligned\s+0;", line):
            runs = False
        elif re.search(r"cp\.async\.c[ag]\.shared", line):
            loads += 1
            early += [number] * runs
    assert products > 8 and loads > 8, "the kernel is not what this test is about"
    assert not early, f"{len(early)} loads into shared memory while a product runs"
