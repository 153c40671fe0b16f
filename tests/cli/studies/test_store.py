"""A study's directory: whose it is, and who is at work in it."""

import json
import multiprocessing
import os
import time
from dataclasses import replace

import pytest
from lm_eval_mamba.cli.studies import claims as claims_module
from lm_eval_mamba.cli.studies.claims import CLAIM, Claims, Owner
from lm_eval_mamba.cli.studies.runner import run_study, states
from lm_eval_mamba.cli.studies.store import Study, StudyError

from .conftest import TINY, recipe


class Scripted:
    """An engine that does no work: `say` maps a run to its outcome."""

    def __init__(self, say, slots=1):
        self.say, self.count, self.done, self.waiting = say, slots, [], []

    def slots(self):
        return self.count

    def submit(self, run, directory, needed):
        self.waiting.append(run)

    def wait(self):
        run = self.waiting.pop()  # the last first: order is the runner's business
        self.done.append(run.id)
        return [(run, self.say(run))]


class Silent:
    def look(self, states):
        pass

    began = ended = lambda self, *arguments: None


def good(run):
    return {"result": {"of": run.id}, "record": {"seconds": 1.0, "device": "none", "versions": {}}}


def bad(run):
    return {"failure": {"error": f"ValueError: {run.name}"}}


def test_a_failed_run_stops_what_needs_it_and_nothing_else(tmp_path):
    study = Study.begin(tmp_path / "s", recipe(TINY))
    first = study.runs[0]
    engine = Scripted(lambda run: bad(run) if run is first else good(run))
    with Claims(study.path) as claims:
        tally = run_study(study, engine, Silent(), claims)
    assert (tally.finished, tally.failed, tally.blocked) == (2, 1, 1)
    assert study.error(first)["error"] == f"ValueError: {first.name}"
    again = Scripted(good)
    with Claims(study.path) as claims:
        run_study(study, again, Silent(), claims)
    assert again.done == []  # not without --retry-failed


def test_a_run_begins_when_what_it_needs_is_finished(tmp_path):
    study = Study.begin(tmp_path / "s", recipe(TINY))
    engine = Scripted(good, slots=9)
    with Claims(study.path) as claims:
        run_study(study, engine, Silent(), claims)
    assert sorted(engine.done) == sorted(run.id for run in study.runs)
    for run in study.runs:
        assert run.needs is None or engine.done.index(run.needs.id) < engine.done.index(run.id)


def test_another_recipe_is_refused_by_its_differences_and_extended_on_request(tmp_path):
    study = Study.begin(tmp_path / "s", recipe(TINY))
    with Claims(study.path) as claims:
        run_study(study, Scripted(good), Silent(), claims)
    Study.begin(tmp_path / "s", recipe("# the same\n" + TINY.replace("[full, sll]", "[ full,  sll ]")))
    with pytest.raises(StudyError, match=r"limit was 3 and is 5.*--extend"):
        Study.begin(tmp_path / "s", recipe(TINY.replace("limit: 3", "limit: 5")))
    with pytest.raises(StudyError, match="study was finetune-divergence and is icl"):
        Study.begin(tmp_path / "s", recipe("study: icl\nmodels: [mini]\n"), extend=True)
    more = Study.begin(tmp_path / "s", recipe(TINY.replace("[full, sll]", "[full, sll, all]")), extend=True)
    assert [states(more)[run.id] for run in more.runs].count("finished") == len(study.runs)
    assert [run.id for run in Study.open(tmp_path / "s").runs] == [run.id for run in more.runs]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(StudyError, match="not empty and no study"):
        Study.begin(tmp_path / "other", recipe(TINY))
    with pytest.raises(StudyError, match="holds no study"):
        Study.open(tmp_path / "other")


def test_a_claim_keeps_others_away_until_its_owner_is_gone(tmp_path):
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    always = lambda: True  # noqa: E731
    assert ours.take("a", always) and not theirs.take("a", always)
    assert ours.holds("a") and not theirs.holds("a")
    ours.release("a")
    assert theirs.take("a", always)
    process = multiprocessing.get_context("fork").Process(target=lambda: Claims(tmp_path).take("b", always))
    process.start()
    process.join()
    assert (tmp_path / "runs" / "b" / CLAIM).is_file() and ours.held_by("b") is None
    assert ours.take("b", always) and ours.holds("b")
    assert not ours.take("c", lambda: False)


def test_a_claim_from_elsewhere_holds_as_long_as_its_heart_beats(tmp_path, monkeypatch):
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    theirs.owner = replace(Owner.here(), host="elsewhere/1/2")
    assert theirs.take("a", lambda: True)
    path = tmp_path / "runs" / "a" / CLAIM
    assert not ours.take("a", lambda: True)
    old = time.time() - claims_module.STALE - 5
    os.utime(path, (old, old))
    assert ours.take("a", lambda: True)
    lost = []
    theirs._lost = lost.append
    monkeypatch.setattr(claims_module, "HEARTBEAT", 0.01)
    with theirs:
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lost[0] == "a" and ours.holds("a")  # and giving it back has left ours alone


def test_a_number_of_another_process_is_no_owner(tmp_path):
    claims = Claims(tmp_path)
    claims.take("a", lambda: True)
    path = tmp_path / "runs" / "a" / CLAIM
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": 1.0, "token": "x"}))
    assert claims.held_by("a") is None


def test_what_was_taken_over_is_not_written(tmp_path):
    study = Study.begin(tmp_path / "s", recipe(TINY))
    first = study.runs[0]

    def robbed(run):
        if run is first and not study.is_finished(run):
            (study.directory(run) / CLAIM).write_text(json.dumps(vars(replace(Owner.here(), token="another"))))
            study.write_result(run, {"of": "another"}, good(run)["record"])
        return good(run)

    with Claims(study.path) as claims:
        run_study(study, Scripted(robbed), Silent(), claims)
    assert study.result(first).result == {"of": "another"}
