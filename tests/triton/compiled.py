"""What a kernel is compiled to for sm_90, for bfloat16 and packed rows; no GPU is needed.

python -m tests.triton.compiled outputs 64 128          # a kernel of Mamba-2's scan, head size, state size
python -m tests.triton.compiled from_both_sides 32      # of an adapter's products, rank

Prints PTX, and behind it what nvdisasm makes of the machine code. In a process of its own: within the tests Triton may
interpret.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_mamba.kernels import products_triton
from peft_mamba.kernels.triton import ssd_backward, ssd_forward
from peft_mamba.kernels.triton.common import next_power_of_2
from peft_mamba.kernels.triton.ssd_plan import Plan

NVDISASM = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
HALF = {"x", "B", "C", "y", "dy", "dx", "h", "g", "shared", "up", "t"}
INTEGERS = {"cu_seqlens", "table"}
FLOATS = {
    *("D", "dD", "step", "s", "into", "out", "through", "initial", "final", "dfinal", "dinitial", "partial"),
    *("reading", "leaving", "both", "direct", "within", "left", "right", "decays"),
}
ABSENT = {"documents": None, "index": None}
FLAGS = {"HAS_D", "WITH_D", "HAS_INITIAL", "WITH_INITIAL", "HAS_FINAL", "WITH_FINAL", "DIRECT", "KEPT"}
STRIDES = ("_row", "_token", "_head", "_group")


def compiled(kernel, constants: dict, options: dict, aligned: bool):
    """`aligned`: strides are multiples of 16, as they are but for odd sizes."""
    names = kernel.arg_names
    upper = {name: name in FLAGS for name in names if name.isupper() and name not in HALF | FLOATS}
    constants = {name: value for name, value in (ABSENT | upper | constants).items() if name in names}
    types = {name: "*bf16" for name in HALF} | {name: "*fp32" for name in FLOATS} | {name: "*i32" for name in INTEGERS}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    multiples = [n for n in names if n not in constants and (n in types or (aligned and n.endswith(STRIDES)))]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def of_scan(name: str, head_size: int, state_size: int):
    module = ssd_backward if "gradients" in name else ssd_forward
    inputs = (torch.empty(1, 300, 4, head_size), torch.empty(1, 300, 1, state_size))
    x, B = (each.to("meta", torch.bfloat16) for each in inputs)
    plan = Plan.of(x, B, None, None, torch.empty(200, dtype=torch.int32, device="meta"))
    constants = plan.described | (plan.state_tiles()[0] if "state" in name else plan.constants)
    options = plan.launch("states of a packed row" if "state" in name else name)
    return compiled(getattr(module, name), constants, options, head_size % 16 == 0)


def of_products(rank: int):
    block = dict(products_triton.BLOCK)
    options = {name: block.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"RANK": rank, "R": max(16, next_power_of_2(rank)), "DOT": tl.bfloat16}
    constants |= block | {"PER_PROGRAM": products_triton.ROWS_PER_PROGRAM}
    return compiled(products_triton._from_both_sides_kernel, constants, options, rank % 16 == 0)


if __name__ == "__main__":
    kernel, *sizes = sys.argv[1:]
    binary = (of_products if kernel == "from_both_sides" else lambda *of: of_scan(kernel, *of))(*map(int, sizes))
    print(binary.asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        subprocess.run([NVDISASM, "-c", file.name], check=True)
