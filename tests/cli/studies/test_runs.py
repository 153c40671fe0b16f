"""The identity of a run: another one whenever its result may be another, the same one otherwise."""

import shutil

import pytest
from lm_eval_mamba.cli.studies.pins import Pins
from lm_eval_mamba.cli.studies.store import planned

from .conftest import TINY, recipe

SCORE = "study: icl\nmodels: [mini]\ntasks: [icl_gap_mini]\nprecisions: [fp32]\n"


def ids(text, base="/", pins=None):
    return [run.id for run in planned(recipe(text, base), pins or Pins())]


@pytest.mark.parametrize(
    "old, new",
    [
        ("models: [mini]", "models: [mini-2]"),
        ("train[:48]", "train[:49]"),
        ("precision: fp32", "precision: [fp32]\n  max_length: 64"),
        ("max_steps: 4", "max_steps: 5"),
        ("max_steps: 4", "max_steps: 4\n  learning_rate: 1e-4"),
        ("max_steps: 4", "max_steps: 4\n  batch_size: 4"),
        ("tasks:", "seeds: [1]\ntasks:"),
    ],
)
def test_of_a_finetuning_changes_with_what_decides_its_result(old, new):
    assert not set(ids(TINY)) & set(ids(TINY.replace(old, new)))


@pytest.mark.parametrize(
    "old, new",
    [
        ("save_steps: 1", "save_steps: 3\n  logging_steps: 2"),
        ("study:", "about: another line\nstudy:"),
        ("[mini]", "[{model: mini, family: Other, size: 3M}]"),
        ("max_steps: 4", "max_steps: 4\n  learning_rate: [1e-3]\n  batch_size: 16"),  # the default, said
    ],
)
def test_is_the_same_whatever_else_changes(old, new):
    text = TINY.replace("[full, sll]", "full")
    assert ids(text) == ids(text.replace(old, new))


@pytest.mark.parametrize(
    "new",
    ["limit: 5", "batch_size: 8", "seeds: [1]", "precisions: [bf16]", "models: [mini-2]", "tasks: [mini_piqa]"],
)
def test_of_a_scoring_changes_with_what_decides_its_result(new):
    key = new.partition(":")[0]
    text = "".join(line for line in SCORE.splitlines(keepends=True) if not line.startswith(key)) + new + "\n"
    assert set(ids(SCORE)).isdisjoint(ids(text))


def test_a_checkpoint_is_its_content_and_not_its_place(tiny, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(tiny["mamba"], tmp_path / name)
    text = SCORE.replace("mini]\nt", "./one]\nt")
    assert ids(text, tmp_path) == ids(text.replace("one", "two"), tmp_path)
    config = tmp_path / "two" / "config.json"
    config.write_text(config.read_text() + " ")
    assert ids(text, tmp_path) != ids(text.replace("one", "two"), tmp_path)


def test_a_hub_name_is_the_commit_that_it_was_pinned_to():
    text = SCORE.replace("[mini]", "[state-spaces/mamba-130m-hf]")
    pinned = [Pins({"model state-spaces/mamba-130m-hf@main": f"commit:{digit * 40}"}) for digit in "12"]
    assert ids(text, pins=pinned[0]) != ids(text, pins=pinned[1])
    (run,) = planned(recipe(text), pinned[0])
    assert run.free["revision"] == "1" * 40
    assert not Pins({}).stored and Pins({}).complete
    unpinned = Pins()
    ids(text, pins=unpinned)
    assert not unpinned.complete
