"""TRL's SFTTrainer in one of our precisions, with checkpoints that are complete or absent, and a loss that is finite.

Mixed precision is `peft_mamba.precision`, the same as in scoring: fp32 weights, autocast around the loss. accelerate's
own is left off, since it has no fp16 on a CPU (it trains in fp32 without a word) and lets FSDP cast the weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from peft_mamba.nonfinite import NonFiniteError, first_nonfinite
from peft_mamba.precision import Precision

from . import distributed
from .fused_head import SFT_OUTPUTS, add_fused_lm_head
from .measures import Meter, Tally
from .outputs import RunDirectory
from .packed import FILLER, FullBatches

TRY = (
    "Try a lower --learning-rate, --warmup-steps, or --max-grad-norm below 1{more}; a new run can start from that "
    "checkpoint's weights with --model or peft=."
)


class DivergedError(FloatingPointError):
    """Training stopped because its numbers are not finite any more."""


class MambaTrainer(SFTTrainer):
    """SFTTrainer that computes in a `Precision` and writes into a `RunDirectory`.

    Args:
        full_batches: packed batches are all filled up to one size.

    Raises:
        DivergedError: a loss or gradient is not finite, or gradients overflow at every loss scale; nothing is saved
            after that.
        SaveError: a checkpoint could not be written.
    """

    model: Any

    def __init__(
        self, *args: Any, precision: Precision, directory: RunDirectory, full_batches: bool = False, **kwargs: Any
    ) -> None:
        self.precision = precision
        self.directory = directory
        super().__init__(*args, **kwargs)
        add_fused_lm_head(self.model, outputs=SFT_OUTPUTS)
        if full_batches:
            collate: Any = self.data_collator
            arguments: Any = self.args
            rows, length = arguments.per_device_train_batch_size, arguments.max_length
            self.data_collator = FullBatches(collate, rows, length, collate.pad_token_id)
        self.meter = Meter(self.args.device)
        self._saving = False
        self._unchecked_norm: torch.Tensor | float | None = None
        self.add_callback(_Steps(self))

    # precision

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = distributed.prepare(self.accelerator, self.model)
        if self.precision.loss_scaling:
            # Handed to the optimizer by accelerate's prepare, which then scales, skips and updates.
            self.accelerator.scaler = torch.amp.GradScaler(self.accelerator.device.type)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.precision.scope(self.args.device))
        return stack

    def _clip_grad_norm(self, model: Any) -> Any:
        self._unscale()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # there was no clipping
            self._unscale()
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # a scaler skips the step by itself
            self._unchecked_norm = norm
        return norm

    def _unscale(self) -> None:
        """Undo the loss scaling before gradients are measured; accelerate does so for its own mixed precision only."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(getattr(self.optimizer, "optimizer", self.optimizer))

    # finite or stopped

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        filler = inputs.pop(FILLER, 0)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            self.meter.batch(inputs, filler)
            # TRL has just waited for the device to read its metrics, so these cost nothing more.
            loss = result[0] if isinstance(result, tuple) else result
            self.check_gradient()
            if not math.isfinite(loss.item()):
                raise self._diverged(f"the loss is {loss.item()}", lambda: model(**inputs, fused_lm_head=True))
        return result

    def check_gradient(self) -> None:
        """Raises DivergedError if the last step was made with a gradient that is not finite."""
        norm, self._unchecked_norm = self._unchecked_norm, None
        if norm is not None and not math.isfinite(float(norm)):
            raise self._diverged(f"the norm of the gradient is {float(norm)}", None)

    def check_scale(self) -> None:
        """Raises DivergedError if the loss scaler has gone below 1, where fp16 holds no gradient of this size."""
        scaler = self.accelerator.scaler
        if scaler is not None and self.accelerator.optimizer_step_was_skipped:
            self.meter.tally.skipped += 1
            if scaler.get_scale() < 1:
                raise self._diverged("gradients overflow in fp16 at every loss scale", None)

    def _diverged(self, what: str, forward: Any) -> DivergedError:
        where = None
        if forward is not None and self.accelerator.num_processes == 1:
            with self.compute_loss_context_manager(), contextlib.suppress(NonFiniteError):
                where = first_nonfinite(self.model, forward)
        last = self.directory.last_checkpoint
        kept = f"The last good checkpoint is {last}." if last else "No checkpoint had been written."
        more = ", or --precision bf16, whose range is fp32's" if self.precision.loss_scaling else ""
        return DivergedError(
            f"step {self.state.global_step + 1}: {what}{f'; {where}' if where else ''}. {kept} {TRY.format(more=more)}"
        )

    # checkpoints

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]  # Trainer calls it by keywords
        # Trainer makes one more step when it resumes from the last one (transformers 5.23).
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        # Trainer asks for it when it writes a checkpoint and when it sorts them at the end.
        return str(self.directory.staging) if self._saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_gradient()
        name = f"checkpoint-{self.state.global_step}"
        with self.meter.pause(), self._into_staging(name):
            super()._save_checkpoint(model, trial)
            self.meter.tally.save(self.directory.staging / name, self.args.process_index)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.directory.publish_checkpoint(name)
        if self.args.should_save:
            rotate_checkpoints(output_dir=str(self.directory.path), save_total_limit=self.args.save_total_limit)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with distributed.gathered(self.accelerator):
            super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        super()._save(output_dir, distributed.without_tied(model, state_dict))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with distributed.past_scaler(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None in every checkpoint; the run's own files say what it is."""

    @contextlib.contextmanager
    def _into_staging(self, what: str) -> Iterator[None]:
        """All processes write into the staging directory; the first one publishes it at the end."""
        self._saving = True
        try:
            with self.directory.saving(what, owner=self.args.should_save):
                self.accelerator.wait_for_everyone()  # until the staging directory is empty
                yield
            self.accelerator.wait_for_everyone()
        finally:
            self._saving = False

    def save_result(self) -> None:
        """Write adapter or model and tokenizer to the top of the directory, in one go."""
        with self._into_staging("The result"):
            self.save_model(str(self.directory.staging))
            if self.args.should_save:
                (self.directory.staging / "training_args.bin").unlink(missing_ok=True)
                self.directory.publish_result()

    # the held-out loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.meter.pause():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, with the mean loss over tokens: a mean over batches depends on their size, and on packing."""
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        loss, tokens = self.accelerator.reduce(self._evaluated, reduction="sum").tolist()
        assert output.metrics is not None
        output.metrics[f"{kwargs['metric_key_prefix']}_loss"] = loss / max(tokens, 1)
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        self._evaluated += torch.stack([loss.double() * tokens, tokens.double()]).to(self._evaluated.device)
        return loss, logits, labels

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.meter.adopt(Tally.load(Path(resume_from_checkpoint), self.args.process_index))
        super()._load_from_checkpoint(resume_from_checkpoint, model)


class _Steps(TrainerCallback):
    """Tells the trainer where training begins, steps and ends."""

    def __init__(self, trainer: MambaTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_scale()
        self._trainer.meter.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.meter.stop()
        self._trainer.check_gradient()
