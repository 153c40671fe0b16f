"""What a result may depend on beside its settings: versions of the packages, the state of the checkout."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

REQUIRED = ("lm-eval-mamba", "lm_eval", "torch", "transformers", "peft", "accelerate")
OPTIONAL = ("triton", "mamba-ssm", "causal-conv1d")


def versions(*more: str) -> dict[str, str | None]:
    """Distribution name to version, None where one is not installed; Python's own too."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*REQUIRED, *more, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def git_state() -> dict[str, str | bool] | None:
    """Commit of the repository around the working directory, and whether it has changes; None outside of one."""
    try:
        commit, changes = (
            subprocess.run(["git", *command], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}
