"""Lets a plain `lm_eval` find our backend and task groups, where lm-eval does not look for plugins itself.

lm-eval merged entry points for models (EleutherAI/lm-evaluation-harness #4013, #4014) after its release 0.4.13 and has
not merged those for tasks (#4015). Until a release reads both, `lm_eval_mamba.pth` adds a finder to `sys.meta_path` at
Python start-up (`buildtools/startup.py`: it imports nothing). When lm-eval imports the two modules in `_HOOKS`, the
finder calls `find_spec` here, and ours is added to what they hold. Where lm-eval already has it, nothing is done.
"""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec as find_package
from pathlib import Path
from types import ModuleType
from typing import Any

MODELS = {"mamba_amp": "lm_eval_mamba.backend:MambaAMP"}


def find_spec(finder: Any, name: str, path: Any, target: Any) -> ModuleSpec | None:
    """The spec that the other finders give for `name`, with our hook to run right after the module's own code."""
    for other in sys.meta_path:
        spec = None if other is finder else other.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            break
    else:
        return None
    hook, run = _HOOKS[name], spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        try:
            hook(module)
        except Exception as error:
            _warn(error)

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


def _register_models(module: ModuleType) -> None:
    """Give lm-eval's model registry the lazy placeholders that it would make of our entry points."""
    from lm_eval.api import registry

    if hasattr(registry, "import_plugins"):  # this lm-eval reads the entry-point group lm_eval.models
        return
    for name, target in MODELS.items():
        registry.model_registry.register(name, target=target)


def _register_tasks(module: Any) -> None:
    """Have lm-eval's task index scan our folder after its own and before the user's `--include_path`."""
    builtin = Path(module.__file__).parent
    ours = Path(find_package("lm_eval_mamba.tasks").submodule_search_locations[0])  # type: ignore[union-attr, index]
    build = module.TaskIndex.build

    def build_with_ours(paths, **kwargs):
        paths = list(paths)
        if builtin in paths and ours not in paths:  # not with include_defaults=False, nor where lm-eval found it
            paths.insert(paths.index(builtin) + 1, ours)
        return build(paths, **kwargs)

    module.TaskIndex.build = staticmethod(build_with_ours)


_HOOKS = {"lm_eval.models": _register_models, "lm_eval.tasks._index": _register_tasks}


def _warn(error: Exception) -> None:
    logging.getLogger(__name__).warning(
        "lm-eval-mamba %s could not add itself to lm-eval %s: %s: %s. `--model mamba_amp` or the task groups will not "
        "be found; install a version of lm-eval that lm-eval-mamba was tested with (see its constraints.txt).",
        version("lm-eval-mamba"),
        version("lm_eval"),
        type(error).__name__,
        error,
    )
