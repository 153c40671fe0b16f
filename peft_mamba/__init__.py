"""PEFT for Mamba and Mamba-2: what you name is what trains. Importing this package makes PEFT's LoRA work on both.

import peft_mamba
model = peft.get_peft_model(model, peft_mamba.MambaLoraConfig(preset="sll", r=16))
print(peft_mamba.report(model))
"""

from .config import MambaLoraConfig
from .kernels import KernelError, Kernels
from .mixers import RecomputeError, recompute, use_cuda_graphs, use_mixers
from .precast import PrecastError, precast_frozen_weights
from .presets import PresetError, preset_modules
from .report import GradientError, Report, report
from .tuner import TargetError, register

__all__ = [
    "GradientError",
    "KernelError",
    "Kernels",
    "MambaLoraConfig",
    "PrecastError",
    "PresetError",
    "RecomputeError",
    "Report",
    "TargetError",
    "precast_frozen_weights",
    "preset_modules",
    "recompute",
    "report",
    "use_cuda_graphs",
    "use_mixers",
]

register()
