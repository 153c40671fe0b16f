"""Every kind of study, done and reported, on the embedded models; published rows stand beside those of their models."""

import csv
import re

import pytest
from lm_eval_mamba.cli.studies.recipe import builtin_text

# What makes the recipes that come along a matter of seconds.
SMALLER = {
    "icl": {
        "limit: 24": "limit: 3",
        "max_steps: 30": "max_steps: 2",
        "models: .*": "models: [{model: mini, family: Mamba, size: 130M}, mini-2]",
    },
    "divergence": {"limit: 24": "limit: 4", "models: .*": "models: [mini-2]"},
    "throughput": {r"preset: \[.*": "preset: full", "max_steps: 10": "max_steps: 2"},
    "robustness": {"max_steps: 20": "max_steps: 2", "models: .*": "models: [mini]", "sample: 4": "sample: 2"},
    "w-ablation": {
        "max_steps: 20": "max_steps: 2",
        "models: .*": "models: [{model: mini-2, family: Mamba-2, size: 1.3B}]",
        "tasks: .*": "tasks: [mini_piqa, mini_lambada]",
        "limit: 24": "limit: 5",
    },
    "stability": {"tokens: 128": "tokens: 16", "seeds: 3": "seeds: 2"},
}
SAYS = {
    "icl": [
        "AIPSS, published",
        "Mamba 130M",
        "published | 0 | 35.3 | 64.5 | 48 | 24.2 | 44.8 | 44.3 | 16.07 |",
        "AIPSS of one family over",
    ],
    "divergence": ["| published |", "fp16", "Mean divergence from fp32"],
    "throughput": ["ATPS", "MMPT", "memory (%)", "full bf16", "cpu, "],
    "robustness": ["Spread over configurations", "max - min", "mini_arc_easy"],
    "w-ablation": ["W only", "How often W alone is ahead", "all but W", "both layers", "4.54", "mini_lambada ppl"],
    "stability": ["λ_max", "positive", "bf16", "±"],
}


@pytest.mark.parametrize("kind", SMALLER)
def test_done_and_reported(kind, study, tmp_path):
    text = builtin_text(f"{kind}-mini")
    for old, new in SMALLER[kind].items():
        text, count = re.subn(old, new, text)
        assert count == 1, old
    (tmp_path / "my.yaml").write_text(text)
    status, output = study("run", tmp_path / "my.yaml", "-o", tmp_path / "study", "--device", "cpu")
    assert status == 0, output
    assert study("report", tmp_path / "study")[0] == 0
    report = (tmp_path / "study" / "report" / "report.md").read_text()
    for said in SAYS[kind]:
        assert said in report, said
    for figure in (tmp_path / "study" / "report" / "figures").glob("*.csv"):
        rows = list(csv.DictReader(figure.read_text().splitlines()))
        assert rows and figure.with_suffix(".svg").is_file() and not re.search(r"#[0-9a-f]{6}", _drawn(figure))
        for row in rows:
            for name in row:
                if row.get(f"{name}_low"):
                    assert float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])


def _drawn(figure):
    return re.sub(r"<style>:root.*?</style>", "", figure.with_suffix(".svg").read_text(), flags=re.DOTALL)
