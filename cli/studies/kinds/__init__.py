"""The kinds of study: each a module that says which keys its recipes have, the runs and the report."""

from __future__ import annotations

from . import divergence, finetune_divergence, icl, robustness, stability, throughput, w_ablation
from .kind import Kind

KINDS: dict[str, Kind] = {
    each.name: each
    for each in (
        icl.KIND,
        divergence.KIND,
        finetune_divergence.KIND,
        throughput.KIND,
        robustness.KIND,
        w_ablation.KIND,
        stability.KIND,
    )
}
