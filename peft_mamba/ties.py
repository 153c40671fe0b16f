"""Tied embeddings: one matrix that is both the input embedding and the output head, until an adapter is merged into it.

An adapter on one of the two is a change of that one alone. Merged into the shared matrix it would change the other as
well, and so the model's outputs.
"""

from __future__ import annotations

import logging

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer under a module's adapters; the module itself if it has none."""
    return BaseTunerLayer.get_base_layer(module) if isinstance(module, BaseTunerLayer) else module


def tied_adapters(model: nn.Module) -> list[str]:
    """Names of the input embedding and output head of `model` that carry an adapter while they share one matrix."""
    if not isinstance(model, PreTrainedModel):
        return []
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if None in ends or base_layer(ends[0]).weight is not base_layer(ends[1]).weight:
        return []
    adapted = [module for module in ends if isinstance(module, BaseTunerLayer)]
    return [name for name, module in model.named_modules() if any(module is end for end in adapted)]


def break_tie(model: PreTrainedModel) -> None:
    """Give the output head a copy of the shared matrix as its own weight, in the model and in its configuration."""
    head = base_layer(model.get_output_embeddings())
    shared = head.get_parameter("weight")
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    model.config.tie_word_embeddings = False
    # transformers saves and reloads by this record of what shares memory with what.
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    logger.info("Merging an adapter on tied embeddings: they are two matrices from here on, tie_word_embeddings=False.")
