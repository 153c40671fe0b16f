"""Lets a plain `lm_eval` find our backend and task groups, where lm-eval does not look for plugins itself.

lm-eval merged entry points for models (EleutherAI/lm-evaluation-harness #4013, #4014) after its release 0.4.13 and
has not merged those for tasks (#4015). Until a release reads both, `lm_eval_mamba.pth` calls `install` at Python
start-up. That only adds a finder to `sys.meta_path`; when lm-eval itself imports the two modules below, ours are added
to what they hold. Where lm-eval already has them, nothing is done. No other module is looked at, and this file imports
`sys` alone: it runs in every interpreter of the environment.
"""

import sys

MODELS = {"mamba_amp": "lm_eval_mamba.backend:MambaAMP"}


class _PostImport:
    """Meta-path finder that runs a hook right after lm-eval's own code of a module has run."""

    def find_spec(self, name, path=None, target=None):
        hook = _HOOKS.get(name)
        if hook is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            try:
                hook(module)
            except Exception as error:
                _warn(error)

        spec.loader.exec_module = exec_module
        return spec


def _register_models(module) -> None:
    """Give lm-eval's model registry the lazy placeholders that it would make of our entry points."""
    from lm_eval.api import registry

    if hasattr(registry, "import_plugins"):  # this lm-eval reads the entry-point group lm_eval.models
        return
    for name, target in MODELS.items():
        registry.model_registry.register(name, target=target)


def _register_tasks(module) -> None:
    """Have lm-eval's task index scan our folder after its own and before the user's `--include_path`."""
    from importlib.util import find_spec
    from pathlib import Path

    builtin = Path(module.__file__).parent
    ours = Path(find_spec("lm_eval_mamba.tasks").submodule_search_locations[0])
    build = module.TaskIndex.build

    def build_with_ours(paths, **kwargs):
        paths = list(paths)
        if builtin in paths and ours not in paths:  # not with include_defaults=False, nor where lm-eval found it
            paths.insert(paths.index(builtin) + 1, ours)
        return build(paths, **kwargs)

    module.TaskIndex.build = staticmethod(build_with_ours)


def _warn(error: Exception) -> None:
    import logging
    from importlib.metadata import version

    logging.getLogger(__name__).warning(
        "lm-eval-mamba %s could not add itself to lm-eval %s: %s: %s. `--model mamba_amp` or the task groups will not "
        "be found; install a version of lm-eval that lm-eval-mamba was tested with (see its constraints.txt).",
        version("lm-eval-mamba"),
        version("lm_eval"),
        type(error).__name__,
        error,
    )


_HOOKS = {"lm_eval.models": _register_models, "lm_eval.tasks._index": _register_tasks}


def install() -> None:
    """Add the finder once; called by `lm_eval_mamba.pth`."""
    if not any(isinstance(finder, _PostImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImport())
