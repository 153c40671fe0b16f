"""What a report says, and that it needs nothing but itself."""

import csv
import json
import re
import shutil
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from lm_eval_mamba.cli.studies.recipe import Recipe
from lm_eval_mamba.cli.studies.report import divergence
from lm_eval_mamba.cli.studies.report.document import Figure, Report, Section, Table, shown
from lm_eval_mamba.cli.studies.report.html import page
from lm_eval_mamba.cli.studies.report.theme import CSS, standalone, svg
from lm_eval_mamba.cli.studies.report.write import provenance
from lm_eval_mamba.cli.studies.store import Study

from lm_eval_mamba.results import read
from lm_eval_mamba.statistics import Estimate


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_divergence_is_what_the_documents_say(undisturbed):
    study = Study.open(undisturbed)
    accuracy = {}
    for each in study.finished():
        if each.run.action == "score":
            cells = read(each.directory / "lm_eval", "fp32")["divergence_mini"].cells
            of = {k: np.mean([c.accuracy for (_, shots), c in cells.items() if shots == k]) for k in (0, 1, 3, 5)}
            accuracy[each.labels["preset"]] = of
    expected = np.mean([100 * abs(accuracy["sll"][k] - accuracy["full"][k]) for k in (0, 1, 3, 5)])
    (row,) = rows(undisturbed / "report" / "figures" / "divergence_embedded_divergence_mini.csv")
    assert (row["model"], row["fine-tuning"]) == ("Mamba mini", "sll fp32")
    assert float(row["divergence"]) == pytest.approx(expected)
    assert float(row["divergence_low"]) <= expected <= float(row["divergence_high"])
    text = (undisturbed / "report" / "report.md").read_text()
    assert "paired bootstrap over documents" in text and "One seed: nothing here tells the spread" in text


class Scored:
    """A run that was scored on a task with another's answers."""

    def __init__(self, original, task, labels, settings):
        self.labels, self.precisions = labels, ["fp32", "bf16"]
        self.run = SimpleNamespace(action="score", needs=None, settings=settings)
        self._original, self._task = original, task

    def studies(self, precision=None):
        return {self._task: self._original.studies()["divergence_mini"]}


def test_published_divergences_stand_beside_those_of_the_same_model(undisturbed):
    ours, theirs = (each for each in Study.open(undisturbed).finished() if each.run.action == "score")
    labels = {"family": "Mamba-2", "size": "130M", "seed": 0}
    model = Scored(ours, "mmlu_divergence", labels, {})
    (section,) = divergence.report(Recipe.load("divergence"), [model]).sections
    (row,) = next(part for part in section.parts if isinstance(part, Table)).rows
    assert (row["precision"], row["published"]) == ("bf16", 0.67)

    recipe = Recipe.load("finetune-divergence")
    task = "mmlu_divergence"
    tuned = [
        Scored(
            original,
            task,
            {"family": "Pythia", "size": "160M", "seed": 0, "dataset": "alpaca", "preset": preset, "precision": "fp32"},
            {"tasks": [task], "preset": preset, "precision": "fp32"},
        )
        for original, preset in ((ours, "full"), (theirs, "all"))
    ]
    (section,) = divergence.report_finetuned(recipe, tuned).sections
    (row,) = section.parts[-1].rows
    assert (row["family"], row["configurations"], row["published mean divergence"]) == ("Pythia", 1, 0.37)


def test_the_page_refers_to_nothing_outside(undisturbed):
    text = (undisturbed / "report" / "report.html").read_text()
    without_namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"https?://|//|<script|<link|@import|src=", without_namespaces.replace("</", "<"))
    assert set(re.findall(r'href="(.)', text)) <= {"#"} and set(re.findall(r"url\((.)", text)) <= {"#"}
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme:dark" in text and text.count("<svg") == 1
    drawing = (undisturbed / "report" / "figures" / "divergence_embedded_divergence_mini.svg").read_text()
    ElementTree.fromstring(drawing.split("\n", 1)[1])
    assert "prefers-color-scheme:dark" in drawing and "Mamba mini" in drawing  # text stays text


def test_every_colour_follows_the_scheme():
    def draw(canvas, rows):
        from lm_eval_mamba.cli.studies.report.charts import bars

        bars(canvas, rows, group="g", series="s", value="v", label="v", line=1.0, line_label="spike", points="p")

    data = [{"g": "a", "s": str(i), "v": i, "v_low": i - 0.5, "v_high": i + 0.5, "p": [i, i + 1]} for i in range(7)]
    drawing = svg(Figure("f", "c", data, draw))
    assert not re.findall(r"#[0-9a-f]{6}", drawing)
    used = set(re.findall(r"var\((--\w+)\)", drawing))
    assert used == {"--ink", "--grid", "--spike", *(f"--c{i}" for i in range(7))}
    for scheme in CSS.split("prefers-color-scheme"):
        assert all(f"{name}:#" in scheme for name in used)
    assert drawing == svg(Figure("f", "c", data, draw))  # the same each time
    assert "<style>" in standalone(drawing)


def test_text_cannot_break_the_page():
    report = Report("<b>", [Section("a & b", ["**x** <i>", Table('"', [{"<script>": "</td>"}])])])
    text = page("about <", report, {})
    assert "<strong>x</strong> &lt;i&gt;" in text and "<script>" not in text and "&lt;/td&gt;" in text


@pytest.mark.parametrize(
    "value, text",
    [
        (Estimate(1.23456, 0.1, (1.0, 2.0)), "1.23 [1, 2]"),
        (Estimate(1.23456, 0.12345), "1.235 ± 0.12"),
        (Estimate(float("nan"), 0.1), "–"),
        (float("nan"), "–"),
        (None, "–"),
        (0.0, "0"),
        (12.5, "12.5"),
        (100, "100"),
        (0.00012345, "1.23e-04"),
        ("x", "x"),
    ],
)
def test_a_cell(value, text):
    assert shown(value) == text


def test_other_versions_of_the_package_are_shown_as_such(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "study")
    assert not any("versions are mixed" in str(part) for part in provenance(Study.open(tmp_path / "study")).parts)
    first = sorted((tmp_path / "study").glob("runs/*/result.json"))[0]
    contents = json.loads(first.read_text())
    contents["record"]["versions"]["lm-eval-mamba"] = "0.0.9"
    first.write_text(json.dumps(contents))
    said = " ".join(map(str, provenance(Study.open(tmp_path / "study")).parts))
    assert "lm-eval-mamba" in said and "0.0.9 (1 runs)" in said and "versions are mixed" in said


def test_of_an_unfinished_study(undisturbed, tmp_path, study):
    shutil.copytree(undisturbed, tmp_path / "study")
    for result in (tmp_path / "study").glob("runs/*/result.json"):
        result.unlink()
    assert study("report", tmp_path / "study")[0] == 0
    assert "Runs: 4 missing" in (tmp_path / "study" / "report" / "report.md").read_text()


def test_without_matplotlib_says_how_to_get_it(undisturbed, tmp_path, study, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, output = study("report", undisturbed, "-o", tmp_path / "report")
    assert status == 1 and 'pip install "lm-eval-mamba[study]"' in output
