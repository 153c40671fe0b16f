"""What a kernel is compiled to for sm_90, for bfloat16 and packed rows; no GPU is needed.

python -m tests.triton.compiled outputs:64:128          # a kernel of Mamba-2's scan, head size, state size
python -m tests.triton.compiled from_both_sides:32      # of an adapter's products, rank
python -m tests.triton.compiled scan_backward:2         # of Mamba-1's scan, bytes of a number

Prints PTX, and behind it what nvdisasm makes of the machine code, for each kernel that is named. In a process of its
own: within the tests Triton may interpret.
"""

from __future__ import annotations

import functools
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
from peft_mamba.kernels.triton import selective_scan, ssd_backward, ssd_forward
from peft_mamba.kernels.triton.common import next_power_of_2
from peft_mamba.kernels.triton.ssd_plan import Plan

# In front of each kernel's code.
HEADING = "=" * 40
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


def compiled(kernel, constants: dict, options: dict, aligned: bool, rows: dict | None = None):
    """`aligned`: strides are multiples of 16, as they are but for odd sizes. `rows`: types other than those above."""
    names, rows = kernel.arg_names, rows or {}
    upper = {name: name in FLAGS for name in names if name.isupper() and name not in HALF | FLOATS | set(rows)}
    constants = {name: value for name, value in (ABSENT | upper | constants).items() if name in names}
    types = {name: "*bf16" for name in HALF} | {name: "*fp32" for name in FLOATS} | {name: "*i32" for name in INTEGERS}
    types |= rows
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


def of_selective_scan(name: str, item: int):
    """With rows that are copied ahead, and the gradients of all; in half precision of packed rows."""
    constants = dict.fromkeys(("HAS_D", "HAS_Z", "HAS_BIAS", "SAVE", "SHARED", "GRAD_A", "GRAD_D", "GRAD_BIAS"), True)
    constants |= dict.fromkeys(("GRAD_H0", "HAS_H0", "HAS_DLAST", "HAS_LENGTHS", "HAS_RESETS", "LAST"), False)
    constants |= {"VARLEN": item == 2, "MASK_D": False, "MASKED": False, "INDEXED": False}
    constants |= {"STATES": 16, "N": 16, "CK": selective_scan.CHECKPOINT, "RING": item}
    backward = name == "scan_backward"
    constants["K"] = selective_scan.BACKWARD_GROUP if backward else selective_scan.FORWARD_GROUP
    options = {"num_warps": 1} | ({"maxnreg": selective_scan.BACKWARD_REGISTERS} if backward else {})
    rows = dict.fromkeys(selective_scan.ROWS, "*fp32" if item == 4 else "*bf16")
    rows |= dict.fromkeys(("A", "B", "C", "bias", "h0", "checkpoints", "last", "dlast", "scratch"), "*fp32")
    rows |= dict.fromkeys(("dBC", "dA", "dbias", "dh0"), "*fp32")
    rows |= {"lengths": "*i32", "resets": "*u8", "index": "*i64"}
    return compiled(getattr(selective_scan, name), constants, options, False, rows)


def of_products(rank: int):
    block = dict(products_triton.BLOCK)
    options = {name: block.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"RANK": rank, "R": max(16, next_power_of_2(rank)), "DOT": tl.bfloat16}
    constants |= block | {"PER_PROGRAM": products_triton.ROWS_PER_PROGRAM}
    return compiled(products_triton._from_both_sides_kernel, constants, options, rank % 16 == 0)


FAMILIES = {"from_both_sides": of_products}
FAMILIES |= {name: functools.partial(of_selective_scan, name) for name in ("scan_forward", "scan_backward")}

if __name__ == "__main__":
    for kernel, *sizes in (each.split(":") for each in sys.argv[1:]):
        binary = FAMILIES.get(kernel, functools.partial(of_scan, kernel))(*map(int, sizes))
        print(HEADING, kernel, *sizes)
        print(binary.asm["ptx"], flush=True)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            subprocess.run([NVDISASM, "-c", file.name], check=True)
