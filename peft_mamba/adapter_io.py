"""Put a saved PEFT adapter on a model so that all of it takes effect, or refuse it.

`PeftModel.from_pretrained` warns about adapter weights that are missing and keeps silent about those that fit no layer:
an adapter of a deeper model scores as if only half of it existed.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from transformers import PreTrainedModel


class AdapterError(ValueError):
    """An adapter that is not there, or does not fit the model; the message names what does not fit."""


@dataclass
class SavedAdapter:
    """An adapter's configuration and weights, read before the base model is loaded."""

    source: str
    revision: str | None
    config: PeftConfig
    weights: dict[str, torch.Tensor]

    @classmethod
    def read(cls, source: str, *, revision: str | None = None) -> SavedAdapter:
        """Read adapter_config.json and the weights from a local directory or hub id.

        Raises:
            AdapterError: no adapter there, or the hub cannot be reached.
        """
        try:
            config = PeftConfig.from_pretrained(source, revision=revision)
            weights = load_peft_weights(source, device="cpu", revision=revision)
        except (OSError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
            raise AdapterError(
                f"peft={source} is no PEFT adapter that can be read: {error}. Give a directory or hub id with "
                "adapter_config.json and adapter_model.safetensors."
            ) from error
        return cls(source, revision, config, weights)

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """`model` with the whole adapter on it, in eval mode.

        Raises:
            AdapterError: the adapter targets modules or has shapes that the model lacks, brings weights that fit no
                layer, or lacks weights of layers that it targets.
        """
        made_for = (
            f"It was made for {self.config.base_model_name_or_path or 'an unnamed model'}; the model here is "
            f"{getattr(model.config, '_name_or_path', '') or type(model).__name__}."
        )
        # Saved whole beside the adapter when they are targeted or were resized for added tokens.
        embeddings = _embedding_weights(model)
        for name in embeddings & self.weights.keys():
            if (rows := len(self.weights[name])) != model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(rows)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about missing keys; checked in full below
                adapted = PeftModel.from_pretrained(model, self.source, revision=self.revision, config=self.config)
        except (RuntimeError, ValueError) as error:
            raise AdapterError(
                f"peft={self.source} does not fit the model: {str(error).rstrip('.')}. {made_for}"
            ) from error
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        if problem := misfit(self.weights.keys() - embeddings, expected):
            raise AdapterError(f"peft={self.source} {problem}. {made_for}")
        return adapted.eval()


def misfit(brought: Set[str], expected: Set[str], wrong_shapes: Sequence[str] = ()) -> str | None:
    """What keeps an adapter from taking effect as a whole, in one clause; None if nothing does.

    Args:
        brought, expected: names of the weights in its file, and of those that the model has for it.
        wrong_shapes: names, with what is wrong, of weights in both whose shapes differ.
    """
    for problem, names in {
        "brings weights for which the model has no layer": sorted(brought - expected),
        "lacks weights of layers that it targets": sorted(expected - brought),
        "has weights of other shapes": list(wrong_shapes),
    }.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{problem}: {names[0]}{more}"
    return None


def _embedding_weights(model: PreTrainedModel) -> set[str]:
    """Names that an adapter file gives to the weights of the input and output embeddings."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        f"base_model.model.{name}{layer}.weight"
        for name, module in model.named_modules()
        if any(module is embedding for embedding in embeddings)
        for layer in ("", ".base_layer")
    }
