"""Errors of studies that a person can mend, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def explained() -> Iterator[None]:
    """Turn them into one message; let all others through."""
    from lm_eval_mamba.results import ResultsError
    from peft_mamba.checkpoints import CheckpointError
    from peft_mamba.precision import PrecisionError

    from ..studies.claims import ClaimError
    from ..studies.located import RecipeError
    from ..studies.pins import PinError
    from ..studies.report.theme import ReportError
    from ..studies.store import StudyError

    known = (
        CheckpointError,
        ClaimError,
        PinError,
        PrecisionError,
        RecipeError,
        ReportError,
        ResultsError,
        StudyError,
    )
    try:
        yield
    except known as error:
        raise click.ClickException(str(error)) from error
