"""What the host knows of a batch, and how the device gets to know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

# Where the `memo` of a scan may have an `OnHost`.
ON_HOST = "on_host"


class OnHost(NamedTuple):
    """The numbers in cu_seqlens and initial_index, for kernels to plan with: to read them there would wait for it.

    Attributes:
        bounds: (S+1,) cu_seqlens.
        source: (S,) initial_index; None where there is none.
    """

    bounds: np.ndarray
    source: np.ndarray | None


def to_device(device: torch.device, dtype: Any, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Vectors on the device, in one copy that the host does not wait for."""
    if not arrays:
        return []
    together = torch.from_numpy(np.concatenate(arrays).astype(dtype, copy=False))
    if device.type == "cuda":
        together = together.pin_memory()
    return list(together.to(device, non_blocking=True).split([len(each) for each in arrays]))
