"""`mamba-study`, as typed."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from lm_eval_mamba.cli.study import main

from ..lm_eval_mamba.stub import StubLM, evaluate, save


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    lm = StubLM()
    return save(evaluate(lm, ["divergence_mini"], limit=6), tmp_path_factory.mktemp("results"))


def mamba_study(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)], env={"COLUMNS": "140"})


def test_compare_prints_a_table_and_writes_a_report(results, tmp_path):
    report = tmp_path / "deep" / "report.json"
    ran = mamba_study(results, results, "--precision-b", "bf16", "--output", report, "--published", "Mamba/130M")
    assert ran.exit_code == 0, ran.output
    for text in ("divergence_mini: 30 documents at 0, 1, 3, 5 shots", "mean divergence (points)", " to ", "0.03"):
        assert text in ran.output
    written = json.loads(report.read_text())
    figures = written["comparisons"][0]["figures"]
    shown = json.loads(results.read_text())["groups"]["divergence_mini"]
    assert figures["mean divergence (points)"]["difference"]["value"] == shown["divergence_bf16,none"]
    assert written["published"]["inference"][0]["family"] == "Mamba"
    assert written["b"]["precision"] == "bf16"


def test_errors_are_sentences(results, tmp_path):
    for arguments, message in (
        ((results, results, "--precision-a", "fp8"), "fp8 is not a precision"),
        ((results, results, "--published", "GPT/2"), "no divergence of GPT/2"),
        ((results, tmp_path), "no directory with results_*.json"),
        ((results, tmp_path / "missing"), "does not exist"),
    ):
        ran = mamba_study(*arguments)
        assert ran.exit_code != 0 and message in ran.output
        assert "Traceback" not in ran.output


def test_help_says_what_a_and_b_are():
    text = CliRunner().invoke(main, ["compare", "--help"]).output
    assert "reference A" in text and "--log_samples" in text


def test_after_a_plain_lm_eval(tmp_path):
    """Both commands as typed: model arguments reach the group, and its figures come back from the files."""
    arguments = ["--model_args", "pretrained=mini-2,precisions=fp32+bf16", "--tasks", "divergence_mini", "--limit", "2"]
    arguments += ["--log_samples", "--output_path", str(tmp_path), "--batch_size", "64"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lm_eval", "--model", "mamba_amp", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "divergence_bf16 " in ran.stdout and "divergence_fp16" not in ran.stdout
    assert "in other batches changes the log-likelihood" in ran.stderr
    (file,) = tmp_path.rglob("results_*.json")
    again = tmp_path / "report.json"
    compared = mamba_study(tmp_path, file, "--precision-b", "bf16", "--output", again)
    assert compared.exit_code == 0, compared.output
    shown = json.loads(file.read_text())["groups"]["divergence_mini"]
    figure = json.loads(again.read_text())["comparisons"][0]["figures"]["change of log-likelihood (nats)"]["difference"]
    assert figure["value"] == pytest.approx(shown["loglikelihood_change_bf16,none"])
    assert figure["interval"] == pytest.approx(shown["loglikelihood_change_bf16_interval,none"], abs=1e-6)
