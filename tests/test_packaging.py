"""The wheel: what it holds, and that it works in a clean environment, from another directory, and goes away."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "lm_eval_mamba": "lm_eval_mamba",
    "peft_mamba": "peft_mamba",
    "cli": "lm_eval_mamba/cli",
    "tasks": "lm_eval_mamba/tasks",
}


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **kwargs)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, copy)
    assert built.returncode == 0, built.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_every_file_of_the_rooms_and_no_other_top_level_name(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{target}/{path.relative_to(ROOT / room).as_posix()}"
        for room, target in ROOMS.items()
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert expected - names == set()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"lm_eval_mamba", "peft_mamba", "lm_eval_mamba.pth"}


def test_every_package_is_listed():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        f"{target}/{path.parent.relative_to(ROOT / room).as_posix()}".removesuffix("/.").replace("/", ".")
        for room, target in ROOMS.items()
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert listed == found


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds the wheel and nothing else."""
    directory = tmp_path_factory.mktemp("clean")
    venv.create(directory, symlinks=True)
    python = directory / "bin" / "python"
    installed = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    assert installed.returncode == 0, installed.stderr
    return python


def test_an_interpreter_without_lm_eval_starts_in_silence_and_light(clean, tmp_path):
    code = "import sys; print(sorted(m for m in sys.modules if m.startswith(('lm_eval', 'peft', 'torch'))))"
    started = run(clean, "-c", code, cwd=tmp_path)
    assert (started.stdout, started.stderr) == ("[]\n", "")
    finders = run(clean, "-c", "import sys; print([type(f).__name__ for f in sys.meta_path])", cwd=tmp_path)
    assert finders.stdout.startswith("['LMEvalMambaFinder',")


def test_the_wheel_evaluates_from_another_directory_and_uninstalls(clean, tiny, tmp_path):
    site = Path(run(clean, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # The dependencies of this environment, without its start-up files: lm-eval itself, and no other bridge.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    arguments = ["--model", "mamba_amp", "--model_args", f"pretrained={tiny['mamba2']}", "--tasks", "icl_gap_mini"]
    command = [clean, "-m", "lm_eval", *arguments, "--limit", "2", "--output_path", tmp_path / "out"]
    ran = run(*command, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "aipss" in ran.stdout and "mini_lambada" in ran.stdout
    assert list((tmp_path / "out").rglob("results_*.json"))

    gone = run(sys.executable, "-m", "pip", "--python", clean, "uninstall", "--yes", "lm-eval-mamba")
    assert gone.returncode == 0, gone.stderr
    assert not (site / "lm_eval_mamba.pth").exists()
    after = run(*command, cwd=tmp_path)
    assert after.returncode != 0 and "icl_gap_mini" in after.stderr
