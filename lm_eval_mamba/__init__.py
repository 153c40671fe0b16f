"""What lm-evaluation-harness sees of this package: discovery, the `mamba_amp` backend, task groups, their metrics.

Importing it costs next to nothing, because Python does so at every start-up for `lm_eval_mamba.bridge`:
keep heavy imports in the modules.
"""


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("lm-eval-mamba")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
