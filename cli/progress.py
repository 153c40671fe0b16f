"""The progress of a run: a bar on a terminal, lines elsewhere; loss, tokens per second, memory."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from .measures import Meter, peak_memory


def gib(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


class ShowProgress(TrainerCallback):
    """Shows steps, loss, real tokens per second and peak memory, on the first process."""

    def __init__(self, meter: Meter, console: Console) -> None:
        self._meter, self._console = meter, console
        self._bar: Progress | None = None
        self._task: Any = None
        self._last = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = self._meter.now()
        if state.is_world_process_zero and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, figures="")
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        if "eval_loss" in logs:
            self._print(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        seconds, tokens = self._meter.now()
        rate = (tokens - self._last[1]) / max(seconds - self._last[0], 1e-9)
        self._last = (seconds, tokens)
        figures = f"loss {logs['loss']:.4f}  {rate:,.0f} tokens/s  {gib(peak_memory(self._meter.device))}"
        if self._bar is not None:
            self._bar.update(self._task, figures=figures)
        else:
            self._print(f"step {state.global_step}/{state.max_steps}  {figures}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


class StopOnSignal(TrainerCallback):
    """Ctrl-C, or a scheduler's SIGTERM: finish the step, save, stop. A second one ends the process at once."""

    def __init__(self, device: torch.device) -> None:
        self.received: int | None = None
        self.stopped = False
        self._device = device
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agreed() and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def _agreed(self) -> bool:
        """Whether any process has received a signal: all must stop after the same step."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.received is not None
        flag = torch.tensor(float(self.received is not None), device=self._device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)
