"""A plain lm-eval finds the backend and the task groups, and stops finding them without the bridge."""

import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
import types
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.tasks import _index

from lm_eval_mamba import bridge

WITHOUT_BRIDGE = "import sys; sys.meta_path = [f for f in sys.meta_path if type(f).__name__ != 'LMEvalMambaFinder']; "
FIND_MODEL = "from lm_eval.api.registry import get_model; print(get_model('mamba_amp').__name__)"
# As `TaskManager()` does, but for reading lm-eval's own 10,000 files.
FIND_TASK = (
    "from lm_eval.tasks import TaskManager, _index; builtin = str(_index.__file__)[:-9]; "
    "read = _index.TaskIndex._iter_yaml_files; "
    "_index.TaskIndex._iter_yaml_files = staticmethod(lambda p: [] if str(p) + '/' == builtin else read(p)); "
    "print('icl_gap' in TaskManager().all_tasks)"
)


def python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_lm_eval_lists_the_groups(tmp_path):
    command = [Path(sys.executable).with_name("lm_eval"), "ls", "tasks"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300).stdout
    names = {line.split("|")[1].strip() for line in listed.splitlines() if line.startswith("|")}
    assert {"icl_gap", "icl_gap_mini", "mini_piqa", "hellaswag"} <= names


def test_simple_evaluate_finds_model_and_group_by_name(tiny, tmp_path):
    code = (
        f"import lm_eval; r = lm_eval.simple_evaluate(model='mamba_amp', model_args='pretrained={tiny['mamba2']}', "
        "tasks=['icl_gap_mini'], limit=2, bootstrap_iters=0); print('figures', r['groups']['icl_gap_mini'])"
    )
    ran = python(code, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "figures {'alias': 'icl_gap_mini'" in ran.stdout and "aipss,none" in ran.stdout


# If one of these two fails, the installed lm-eval finds us by itself: drop that half of the bridge.


def test_without_the_bridge_this_lm_eval_does_not_find_the_model(tmp_path):
    assert python(FIND_MODEL, tmp_path).stdout == "MambaAMP\n"
    assert "no model for this name found" in python(WITHOUT_BRIDGE + FIND_MODEL, tmp_path).stderr


def test_without_the_bridge_this_lm_eval_does_not_find_the_tasks(tmp_path):
    assert python(FIND_TASK, tmp_path).stdout == "True\n"
    assert python(WITHOUT_BRIDGE + FIND_TASK, tmp_path).stdout == "False\n"


def test_entry_points_declare_what_the_bridge_registers():
    declared = importlib.metadata.entry_points(group="lm_eval.models")
    ours = {point.name: point.value for point in declared if point.dist.name == "lm-eval-mamba"}
    assert ours == bridge.MODELS


def test_where_lm_eval_reads_entry_points_nothing_is_registered(monkeypatch):
    from lm_eval.api import registry

    monkeypatch.setattr(registry, "import_plugins", lambda modules: None, raising=False)
    monkeypatch.setattr(registry.model_registry, "register", lambda *a, **k: pytest.fail("registered all the same"))
    bridge._register_models(types.ModuleType("lm_eval.models"))


def fake_index(recorded: list):
    class TaskIndex:
        @staticmethod
        def build(paths, **kwargs):
            recorded.append(list(paths))

    module = types.ModuleType("lm_eval.tasks._index")
    module.__file__, module.TaskIndex = _index.__file__, TaskIndex
    return module


def test_our_folder_comes_after_the_built_in_one_and_once():
    recorded = []
    module = fake_index(recorded)
    bridge._register_tasks(module)
    builtin, user = Path(_index.__file__).parent, Path("/user/tasks")
    module.TaskIndex().build([builtin, user])
    ours = recorded[0][1]
    assert recorded[0] == [builtin, ours, user] and (ours / "icl_gap" / "icl_gap.yaml").is_file()
    module.TaskIndex().build([builtin, ours, user])  # an lm-eval that found the folder by itself
    module.TaskIndex().build([user])  # include_defaults=False
    assert recorded[1:] == [[builtin, ours, user], [user]]


def test_a_changed_lm_eval_is_reported_and_not_broken(monkeypatch, caplog):
    def changed(module):
        raise AttributeError("TaskIndex has no attribute 'build'")

    monkeypatch.setitem(bridge._HOOKS, "lm_eval.tasks._index", changed)
    (finder,) = (finder for finder in sys.meta_path if type(finder).__name__ == "LMEvalMambaFinder")
    spec = finder.find_spec("lm_eval.tasks._index", lm_eval.tasks.__path__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks._index", module)
    with caplog.at_level(logging.WARNING):
        spec.loader.exec_module(module)
    assert hasattr(module, "TaskIndex")
    assert "could not add itself to lm-eval" in caplog.text and "no attribute 'build'" in caplog.text


def test_a_broken_plugin_says_what_failed(tmp_path):
    broken = "import sys; sys.modules['peft'] = None; "
    ran = python(broken + FIND_MODEL, tmp_path)
    assert ran.returncode != 0 and "import of peft halted" in ran.stderr


def test_an_editable_install_whose_folder_is_gone_does_no_harm(tmp_path):
    gone = "import sys; sys.modules['lm_eval_mamba'] = None; "
    assert "no model for this name found" in python(gone + FIND_MODEL, tmp_path).stderr
    assert python(gone + FIND_TASK, tmp_path).stdout == "False\n"
