"""The directory of a run: never another run's, never a half-written file under its final name.

out/recipe.yaml        the settings, written before training; what --resume reads, and a file for --config
out/identity.json      what the result depends on beside them; a resumed run is compared with both
out/checkpoint-<step>  complete checkpoints; one in the making lies in out/.incomplete and is renamed when it is done
out/run.json           figures of the finished run
out/                   adapter or model, tokenizer
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import get_last_checkpoint

from .settings import Settings, SettingsError

RECIPE, IDENTITY, RUN, INCOMPLETE = "recipe.yaml", "identity.json", "run.json", ".incomplete"


class SaveError(RuntimeError):
    """Something could not be written; what was there before is there still."""


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all, also after a crash or on a full disk."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def sync(directory: Path) -> None:
    """Have the operating system put every file below `directory` on the disk."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class RunDirectory:
    """The output directory of one run."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def check_free(self) -> None:
        """Raises SettingsError if the directory holds a run, or anything else."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if (self.path / RECIPE).is_file():
            finished = "a finished run" if self.finished else "a run that has not ended"
            raise SettingsError(
                f"--output {self.path} holds {finished}. Give another directory, or go on with it: "
                f"mamba-ft -o {self.path} --resume"
            )
        raise SettingsError(f"--output {self.path} is not empty and no run of mamba-ft. Give another directory.")

    def begin(self, settings: Settings, identity: dict[str, Any]) -> None:
        """Claim the directory for a new run.

        Args:
            identity: what the result depends on beside the settings, JSON values.

        Raises:
            SettingsError: it holds a run, or anything else.
        """
        self.check_free()
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / IDENTITY, json.dumps(identity, indent=2) + "\n")
        write_atomically(self.path / RECIPE, settings.as_yaml())

    def resume(self, settings: Settings, identity: dict[str, Any]) -> None:
        """Claim the directory of a run that is to go on.

        Raises:
            SettingsError: `settings` or `identity` are not those of that run.
        """
        stored = yaml.safe_load((self.path / RECIPE).read_text(encoding="utf-8"))
        changed = settings.differences(stored)
        before = json.loads((self.path / IDENTITY).read_text(encoding="utf-8"))
        changed += [
            f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in identity.items()
            if before.get(name) != value
        ]
        if changed:
            raise SettingsError(
                f"--resume goes on with the run as it was begun, but {'; '.join(changed)}. Give what the run was begun "
                "with, or begin another in another directory."
            )
        shutil.rmtree(self.path / INCOMPLETE, ignore_errors=True)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / RUN).is_file()

    @property
    def last_checkpoint(self) -> Path | None:
        """The complete checkpoint with the most steps."""
        last = get_last_checkpoint(str(self.path)) if self.path.is_dir() else None
        return Path(last) if last else None

    @property
    def staging(self) -> Path:
        """Where a checkpoint is written."""
        return self.path / INCOMPLETE

    def publish_checkpoint(self, name: str) -> None:
        """Give a checkpoint that has been written as a whole its name."""
        sync(self.staging / name)
        shutil.rmtree(self.path / name, ignore_errors=True)
        os.rename(self.staging / name, self.path / name)
        shutil.rmtree(self.staging, ignore_errors=True)

    def publish_result(self) -> None:
        """Move what lies in `staging` to the top of the directory; a loader's config file comes last."""
        sync(self.staging)
        files = sorted(self.staging.iterdir(), key=lambda path: path.name.endswith("config.json"))
        for path in files:
            os.replace(path, self.path / path.name)
        shutil.rmtree(self.staging, ignore_errors=True)

    @contextmanager
    def saving(self, what: str, *, owner: bool) -> Iterator[None]:
        """Around writing into `staging` and publishing it; `owner` is true in one process, which cleans up.

        Raises:
            SaveError: the save failed; the message says why and what is still there.
        """
        if owner:
            shutil.rmtree(self.staging, ignore_errors=True)
        try:
            yield
        except Exception as error:  # safetensors, torch and the operating system each have their own
            if owner:
                shutil.rmtree(self.staging, ignore_errors=True)
            last = self.last_checkpoint
            kept = f"{last} is complete and was not touched" if last else "No checkpoint had been written before"
            free = shutil.disk_usage(self.path).free / 2**20
            raise SaveError(
                f"{what} could not be saved in {self.path}: {error} ({free:,.0f} MiB are free there). {kept}. "
                f"Make room, then go on: mamba-ft -o {self.path} --resume"
            ) from error

    def write_run(self, figures: dict[str, Any]) -> None:
        """Write run.json."""
        write_atomically(self.path / RUN, json.dumps(figures, indent=2) + "\n")

    def read_run(self) -> dict[str, Any]:
        """What run.json holds."""
        return json.loads((self.path / RUN).read_text(encoding="utf-8"))
