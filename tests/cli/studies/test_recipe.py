"""Recipes: those that come along can be planned, and a mistake is named with its line."""

import pytest
from lm_eval_mamba.cli.studies.cost import estimate
from lm_eval_mamba.cli.studies.located import RecipeError
from lm_eval_mamba.cli.studies.pins import Pins
from lm_eval_mamba.cli.studies.recipe import Recipe, builtin_names, builtin_text
from lm_eval_mamba.cli.studies.store import planned

from .conftest import TINY, recipe

ICL = "study: icl\nmodels: [mini]\n"

MISTAKES = (
    ("", "my.yaml:1: the recipe is empty"),
    ("study: icl\nmodels: [mini\n", "my.yaml:3: no YAML"),
    ("study: icl\nmodels: [mini]\nmodels: [mini-2]\n", "my.yaml:3: models is there already, in line 2"),
    ("study: icll\nmodels: [mini]\n", "my.yaml:1: study: is one of icl, divergence"),
    ("study: icl\n", "my.yaml:1: a study icl needs the key models"),
    (ICL + "model: mini\n", "my.yaml:3: a study icl has no key 'model'; it has study, about, models, seeds"),
    (ICL + "precisions: [bf16, fp8]\n", "my.yaml:3: 'fp8' is not one of fp32, fp16, bf16"),
    (ICL + "tasks: [icl_gap_mini,\n  no_such_task]\n", "my.yaml:4: lm-eval has no task 'no_such_task'"),
    (ICL + "limit: 0\n", "my.yaml:3: expected a whole number of at least 1, not 0"),
    (ICL + "seeds: [1, 1]\n", "my.yaml:3: a seed is in the list twice"),
    (ICL + "pretrained: false\n", "my.yaml:3: pretrained: false leaves nothing to do"),
    ("study: icl\nmodels: []\n", "my.yaml:2: the list is empty, so there would be nothing to run"),
    ("study: icl\nmodels:\n  - mini\n  - minni\n", "my.yaml:4: there is no model 'minni'; did you mean mini"),
    ("study: icl\nmodels: [mini, mini]\n", "my.yaml:2: mini is in the list twice"),
    ("study: icl\nmodels: [./nowhere]\n", "my.yaml:2: there is no /nowhere"),
    ("study: icl\nmodels:\n  - {family: Mamba, sizes: [130M, 7B]}\n", "my.yaml:3: Mamba has no size '7B'; it has 130M"),
    ("study: icl\nmodels: [{family: Mambo, sizes: [1B]}]\n", "my.yaml:2: the papers have no family 'Mambo'"),
    ("study: icl\nmodels: [{model: mini, sise: 3M}]\n", "my.yaml:2: a model has no 'sise'"),
    (TINY.replace("sll]", "ssl]"), "my.yaml:5: preset: 'ssl' is not one of 'full', 'all', 'sll', 'w', 'not-w'"),
    (TINY.replace("[full, sll]", "[]"), "my.yaml:5: the list is empty"),
    (TINY.replace("max_steps: 4", "max_step: 4"), "my.yaml:7: mamba-ft has no option 'max_step'"),
    (TINY.replace("max_steps: 4", "max_steps: 0"), "my.yaml:7: max_steps: 0 is not in the range"),
    (TINY.replace("max_steps: 4", "seed: 4"), "my.yaml:7: finetune cannot set seed: that is said by seeds"),
    (TINY.replace("full, sll", "all, sll"), "my.yaml:3: 0 of the 2 configurations of Mamba mini on embedded are the"),
    (TINY.replace("  max_steps: 4", "  r: 8"), "my.yaml:3: Mamba mini: --preset full trains every weight"),
    (TINY.replace("[mini]", "[EleutherAI/pythia-1b]").replace("sll", "w"), "my.yaml:2: Pythia 1B has no preset 'w'"),
    ("study: stability\nmodels: [EleutherAI/pythia-160m]\ntext: embedded\n", "my.yaml:2: Pythia 160M is a gpt_neox"),
    ("study: stability\nmodels: [mini]\ntext: book.txt\n", "my.yaml:3: text is embedded, a file (./book.txt)"),
)  # fmt: skip


@pytest.mark.parametrize("text, message", MISTAKES, ids=[message[:60] for _, message in MISTAKES])
def test_a_mistake_is_named_with_its_line(text, message):
    with pytest.raises(RecipeError) as caught:
        planned(recipe(text), Pins())
    assert message in str(caught.value)


def test_a_sample_is_no_larger_than_its_grid():
    text = builtin_text("robustness-mini").replace("sample: 4", "sample: 99")
    with pytest.raises(RecipeError, match="the grid has 12 combinations, so 99 cannot be drawn"):
        planned(recipe(text), Pins())


@pytest.mark.parametrize("name", builtin_names())
def test_those_that_come_along_can_be_planned_without_network(name):
    asked = Recipe.load(name)
    runs = planned(asked, Pins())
    assert asked.about and len({run.id for run in runs}) == len(runs) >= 2
    for run in runs:
        assert estimate(run, "H200").seconds > 0 and estimate(run, "CPU").tokens > 0
        assert run.needs is None or runs.index(run.needs) < runs.index(run)


def test_the_papers_grids_have_the_papers_sizes():
    plans = {name: planned(Recipe.load(name), Pins()) for name in ("finetune-divergence", "robustness", "icl")}
    finetunings = [run for run in plans["finetune-divergence"] if run.action == "finetune"]
    assert len(finetunings) == 6 * 2 * 9  # models, data sets, {full, all, sll} x {fp32, fp16, bf16}
    alpaca = next(run for run in finetunings if run.labels["dataset"] == "alpaca" and run.labels["size"] == "370M")
    assert (alpaca.settings["epochs"], alpaca.settings["learning_rate"]) == (3.0, 5e-5)
    drawn = [run for run in plans["robustness"] if run.action == "finetune"]
    assert len(drawn) == 2 * 150
    mamba, pythia = (
        [
            (run.settings["learning_rate"], run.settings["r"], run.settings["warmup_steps"])
            for run in drawn[start:][:150]
        ]
        for start in (0, 150)
    )
    assert mamba == pythia and len(set(mamba)) == 150 and len({rate for rate, _, _ in mamba}) == 15
    assert {run.labels["family"] for run in plans["icl"]} == {"Mamba", "Mamba-2", "Pythia", "OLMo", "TinyLlama"}


def test_whatever_is_a_choice_may_be_a_list():
    text = TINY.replace("preset: [full, sll]", "preset: [full, all]\n  learning_rate: [1e-4, 1e-3]").replace(
        "tasks:", "seeds: 2\nreference: {preset: full, precision: fp32, learning_rate: 1.0e-4}\ntasks:"
    )
    runs = [run for run in planned(recipe(text), Pins()) if run.action == "finetune"]
    assert len(runs) == 2 * 2 * 2
    assert {run.settings["learning_rate"] for run in runs} == {1e-4, 1e-3}
    assert {run.settings["seed"] for run in runs} == {0, 1}
