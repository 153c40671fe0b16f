"""TRL's fused output head, for Mamba models whose head is not trained: its results, with two thirds of the products."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from trl.trainer.utils import FusedCausalLMOutput
from trl.trainer.utils import add_fused_lm_head as add_theirs

from peft_mamba.kernels.head import IGNORED, OUTPUTS, token_scores
from peft_mamba.mixers.projection import is_bare, is_linear

Tensor = torch.Tensor

# What SFTTrainer asks of the head.
SFT_OUTPUTS = ("log_probs", "entropy", "is_top1")
FAMILIES = (modeling_mamba.MambaForCausalLM, modeling_mamba2.Mamba2ForCausalLM)


def add_fused_lm_head(
    model: PreTrainedModel | PeftModel, temperature: float = 1.0, outputs: tuple[str, ...] = ("log_probs",)
) -> bool:
    """As trl.trainer.utils.add_fused_lm_head, and faster for a Mamba or Mamba-2 whose output head is frozen.

    `model(input_ids, labels=labels, fused_lm_head=True)` then returns TRL's FusedCausalLMOutput: the loss, and for each
    token what `outputs` name, without logits of the whole batch. TRL's own makes the logits again in backward; here the
    gradient that they are for is made with them (see `peft_mamba.kernels.head`), and the host does not wait to learn
    how many labels there are. Gradients go through `loss`, `log_probs` and `entropy`.

    TRL's trainers add theirs to the model; so call this once the trainer is made:

        trainer = SFTTrainer(model, ...)
        add_fused_lm_head(trainer.model, outputs=SFT_OUTPUTS)

    Where the head is trained, adapted, sharded or has a bias or a hook, TRL's own runs, at each forward anew.

    Args:
        model: with adapters or without.
        temperature: that logits are divided by.
        outputs: "log_probs", "entropy", "is_top1", or what else TRL's knows, which TRL's own then computes.

    Returns:
        Whether ours runs where it can: False for a model of another family, or with outputs that are TRL's alone.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    add_theirs(base, temperature=temperature, outputs=outputs)
    if not isinstance(base, FAMILIES) or set(outputs) - {"log_probs", *OUTPUTS}:
        return False
    wanted = tuple(name for name in OUTPUTS if name in outputs)
    base.forward = types.MethodType(_with_scores(base, temperature, wanted), base)
    return True


def _with_scores(model: PreTrainedModel, temperature: float, outputs: tuple[str, ...]) -> Callable[..., Any]:
    """A forward for a model that has TRL's: with our scores where they can be had, else as it was."""
    theirs = model.forward

    # With the signature of the class, by which `generate` judges its arguments.
    @functools.wraps(type(model).forward)
    def forward(
        self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs
    ) -> Any:
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        head = self.get_output_embeddings()
        if not fused_lm_head or (labels is None and shift_labels is None) or not _is_frozen(head):
            given = {name: each for name, each in given.items() if each is not None}
            return theirs(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        count = _Count(labels[:, 1:] if shift_labels is None else shift_labels)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state.to(head.weight.device)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if shift_labels is None else shift_labels
        targets = targets.to(hidden.device)
        known = count.known()
        scores = token_scores(
            hidden.flatten(0, 1),
            head.weight,
            targets.flatten(),
            temperature=temperature,
            outputs=outputs,
            count=known,
        )
        length = targets.shape[1] - (shift_labels is None)
        log_probs, entropy, is_top1 = (
            None if each is None else each.view(targets.shape)[:, :length] for each in scores
        )
        return FusedCausalLMOutput(
            loss=-scores.log_probs.sum() / (max(known, 1) if num_items_in_batch is None else num_items_in_batch),
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=targets[:, :length] != IGNORED,
        )

    return forward


def _is_frozen(head: nn.Module) -> bool:
    """Whether it is a plain layer without bias that gets no gradient, all of it here."""
    if torch.compiler.is_compiling() or not is_linear(head) or not is_bare(head) or head.bias is not None:
        return False
    weight = head.weight
    sharded = isinstance(weight, DTensor) or hasattr(weight, "ds_id")  # by FSDP, by DeepSpeed
    return not sharded and weight.numel() > 0 and not (weight.requires_grad and torch.is_grad_enabled())


class _Count:
    """How many labels there are that count. The host asks while the layers run, and does not wait for them."""

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels
        self._there = torch.cuda.current_stream(labels.device).record_event() if labels.is_cuda else None

    def known(self) -> int:
        if self._there is None:
            return int((self._labels != IGNORED).sum())
        stream = _side_stream(self._labels.device)
        stream.wait_event(self._there)
        with torch.cuda.stream(stream):
            return int((self._labels != IGNORED).sum())


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
