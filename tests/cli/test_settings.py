"""Defaults and where they come from; what contradicts itself; --config."""

import csv
from importlib import resources

import pytest
import yaml
from click.testing import CliRunner
from lm_eval_mamba.cli.ft import main
from lm_eval_mamba.cli.settings import ModelFacts, Settings, SettingsError, resolve

PLAIN = {
    "model": "some/model",
    "trust_remote_code": False,
    "dataset": "tatsu-lab/alpaca",
    "split": "train",
    "loss_on": "response",
    "preset": "sll",
    "precision": "fp32",
    "packing": False,
    "gradient_checkpointing": False,
    "seed": 0,
    "device": "auto",
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "none",
    "output": "out",
}
# transformers' parameter counts of the published checkpoints
SIZES = {
    ("mamba", 129_135_360): "130M",
    ("mamba", 371_516_416): "370M",
    ("mamba", 793_204_224): "790M",
    ("mamba", 1_372_178_432): "1.4B",
    ("mamba", 2_768_345_600): "2.8B",
    ("mamba2", 128_989_632): "130M",
    ("mamba2", 780_344_832): "780M",
    ("mamba2", 2_702_599_680): "2.7B",
    ("gpt_neox", 162_322_944): "160M",
    ("gpt_neox", 405_334_016): "410M",
    ("gpt_neox", 1_011_781_632): "1B",
}
COLUMN = {"mamba": "mamba_size", "mamba2": "mamba2_size", "gpt_neox": "pythia_size"}


def published(family: str, size: str) -> tuple[float, int]:
    text = (resources.files("lm_eval_mamba") / "published" / "recipes.csv").read_text()
    row = next(row for row in csv.DictReader(text.splitlines()) if row[COLUMN[family]] == size)
    return float(row["learning_rate"]), int(row["lora_r_mamba2" if family == "mamba2" else "lora_r_mamba_pythia"])


@pytest.mark.parametrize(("facts", "size"), SIZES.items())
def test_the_papers_recipe_by_size_is_the_default_and_says_so(facts, size):
    recipe = resolve(PLAIN, {}, ModelFacts(*facts))
    assert (recipe.settings.learning_rate, recipe.settings.r) == published(facts[0], size)
    assert recipe.sources["learning_rate"] == recipe.sources["r"] == f"the papers' recipe for {size}"
    assert recipe.settings.alpha == 2 * recipe.settings.r
    assert (recipe.settings.schedule, recipe.settings.warmup_steps, recipe.settings.max_length) == ("cosine", 0, 512)


def test_a_model_of_another_size_gets_the_nearest_recipe_and_the_table_says_how_near():
    recipe = resolve(PLAIN, {}, ModelFacts("olmo", 7_000_000_000))
    assert recipe.sources["r"] == "the papers' recipe for 2.8B, the nearest of theirs to 7,000M"


@pytest.mark.parametrize(
    ("dataset", "epochs"),
    [("tatsu-lab/alpaca", 3), ("teknium/openhermes", 1), ("GAIR/lima", 5), ("mine.jsonl", 3)],
)
def test_epochs_follow_the_data_set(dataset, epochs):
    recipe = resolve({**PLAIN, "dataset": dataset}, {}, ModelFacts("mamba", 130_000_000))
    assert recipe.settings.epochs == epochs
    assert ("transformers' default" in recipe.sources["epochs"]) == (dataset == "mine.jsonl")


def test_what_was_given_goes_before_every_default():
    given = {**PLAIN, "learning_rate": 0.25, "alpha": 3.0, "max_steps": 7}
    recipe = resolve(given, {"alpha": "the command line"}, ModelFacts("mamba", 130_000_000))
    assert (recipe.settings.learning_rate, recipe.settings.alpha, recipe.settings.epochs) == (0.25, 3.0, None)
    assert recipe.sources["alpha"] == "the command line"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "full", "r": 8}, r"--preset full .* --r 8 would do nothing"),
        ({"epochs": 1.0, "max_steps": 3}, r"--epochs 1.0 and --max-steps 3 both"),
        ({"batch_size": "auto", "gradient_accumulation": 2}, r"--gradient-accumulation 2 cannot hold"),
        ({"batch_size": 4, "effective_batch_size": 16}, r"--effective-batch-size 16 goes with --batch-size auto"),
        ({"recompute": "block", "gradient_checkpointing": True}, r"so --recompute block would do nothing"),
    ],
)
def test_settings_that_contradict_each_other_or_do_nothing_are_refused(given, said):
    with pytest.raises(SettingsError, match=said):
        resolve({**PLAIN, **given}, {}, ModelFacts("mamba", 130_000_000))


def test_recomputation_is_for_mamba_and_left_out_where_checkpoints_are():
    assert resolve(PLAIN, {}, ModelFacts("mamba2", 130_000_000)).settings.recompute == "auto"
    for facts, given in (("gpt_neox", {}), ("mamba", {"gradient_checkpointing": True})):
        assert resolve({**PLAIN, **given}, {}, ModelFacts(facts, 130_000_000)).settings.recompute is None
    with pytest.raises(SettingsError, match="--recompute mixer says what Mamba's mixers keep, and gpt_neox has none"):
        resolve({**PLAIN, "recompute": "mixer"}, {}, ModelFacts("gpt_neox", 130_000_000))


def test_settings_survive_their_file_and_tell_what_changed():
    settings = resolve(PLAIN, {}, ModelFacts("mamba", 130_000_000)).settings
    stored = yaml.safe_load(settings.as_yaml())
    assert Settings(**stored) == settings and settings.differences(stored) == []
    other = {**stored, "seed": 3, "save_steps": 9, "recompute": "block"}  # only the first changes what is learned
    assert settings.differences(other) == ["seed was 3 and is 0"]


def test_help_names_every_option_and_where_defaults_come_from():
    said = " ".join(CliRunner().invoke(main, ["--help"]).output.split())
    for name in Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in said, name
    assert "[default: the papers', by model size]" in said and "[default: 512, as in the papers]" in said


def test_a_config_file_sets_options_and_the_command_line_goes_before_it(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("preset: w\nmax-steps: 3\nbatch_size: 2\nsplit: 'train[:8]'\n")
    ran = CliRunner().invoke(
        main, ["--config", str(config), "--max-steps", "1", "--dry-run", "-o", str(tmp_path / "o")]
    )
    assert ran.exit_code == 0, ran.output
    lines = {line.split("│")[1].strip(): line for line in ran.output.splitlines() if line.startswith("│")}
    assert "w" in lines["preset"] and "the config file" in lines["preset"]
    assert "1" in lines["max_steps"] and "the command line" in lines["max_steps"]
    assert "2" in lines["batch_size"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1", "sets learning_rat, which mamba-ft has no option for"),
        ("- 1", "holds a list"),
        ("a: [", "is no YAML"),
        ("preset: sl", "'sl' is not one of"),
        ("r: 0", "0 is not in the range"),
    ],
)
def test_a_config_file_with_a_mistake_is_refused(tmp_path, text, said):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    ran = CliRunner().invoke(main, ["--config", str(config)])
    assert ran.exit_code == 2 and said in " ".join(ran.output.split())
