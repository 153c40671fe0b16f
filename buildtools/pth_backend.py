"""PEP 517 backend: setuptools, plus one file that setuptools has no public way to place.

`lm_eval_mamba.pth` must lie at the root of site-packages, in a wheel and in an editable install alike: Python runs its
line at every start. The line is `startup.py`, which adds a finder that imports nothing of ours until lm-eval is
imported (see `lm_eval_mamba/bridge.py`). The wheel's RECORD lists the file, so `pip uninstall` removes it.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks that pip and build look up here)
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

PTH = "lm_eval_mamba.pth"


def pth_line() -> str:
    """What the .pth file says: site runs a line that begins with `import`, and only one line."""
    return f"import sys; exec({Path(__file__).with_name('startup.py').read_text()!r})\n"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    _add_pth(Path(wheel_directory) / name)
    return name


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    _add_pth(Path(wheel_directory) / name)
    return name


def _add_pth(wheel: Path) -> None:
    """Rewrite `wheel` with the .pth file at its root and a RECORD line for it (PEP 427)."""
    content = pth_line().encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    rewritten = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(rewritten, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                data += f"{PTH},sha256={digest},{len(content)}\n".encode()
            target.writestr(item, data)
        target.writestr(PTH, content)
    rewritten.replace(wheel)
