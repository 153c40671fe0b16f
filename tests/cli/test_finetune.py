"""mamba-ft as a whole: it learns, in the precision that it names, and says what it did."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from lm_eval_mamba.cli import finetune, memory
from lm_eval_mamba.cli import model as models
from lm_eval_mamba.cli.ft import main
from lm_eval_mamba.cli.settings import ModelFacts, resolve
from lm_eval_mamba.cli.trainer import MambaTrainer
from torch import nn
from transformers import AutoModelForCausalLM

from peft_mamba.checkpoints import AutoMambaForCausalLM, load_config
from peft_mamba.checkpoints import resolve as where
from peft_mamba.precision import Precision

from .conftest import QUICK, SMALL
from .test_settings import PLAIN

COMBINATIONS = [
    *((model, preset, "fp32") for model in ("mini", "mini-2") for preset in ("full", "all", "sll", "w", "not-w")),
    *(
        (model, preset, dtype)
        for model in ("mini", "mini-2")
        for preset in ("full", "sll")
        for dtype in ("fp16", "bf16")
    ),
]


@pytest.mark.parametrize(("model", "preset", "precision"), COMBINATIONS)
def test_it_lowers_the_held_out_loss(ft, model, preset, precision):
    status, said, figures = ft("--model", model, "--preset", preset, "--precision", precision, "--max-steps", "6")
    assert status == 0, said
    loss = figures["held_out_loss"]
    assert loss["after"] < loss["before"] - 0.1, loss
    assert figures["precision"]["name"] == precision and figures["settings"]["preset"] == preset


@pytest.mark.parametrize("model", ["mini", "mini-2"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_projections_run_in_the_precision_that_was_named(ft, model, precision):
    outputs: set[torch.dtype] = set()
    weights: set[torch.dtype] = set()
    scalers: set[type] = set()

    def watch(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if isinstance(module, nn.Linear) and module.weight.shape[0] > 16 and torch.is_grad_enabled():
            outputs.add(output.dtype)
            weights.add(module.weight.dtype)

    step = MambaTrainer.training_step

    def watch_scaler(self, *args, **kwargs):
        scalers.add(type(self.accelerator.scaler))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MambaTrainer, "training_step", watch_scaler)
        hook = nn.modules.module.register_module_forward_hook(watch)
        try:
            assert ft("--model", model, "--preset", "full", "--precision", precision, "--max-steps", "1")[0] == 0
        finally:
            hook.remove()
    expected = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert outputs == {expected} and weights == {torch.float32}
    assert scalers == {torch.amp.GradScaler if precision == "fp16" else type(None)}


def test_half_precision_differs_from_full_and_stays_near_it(ft, tmp_path):
    losses = {
        dtype: ft("--precision", dtype, output=tmp_path / dtype)[2]["held_out_loss"]["before"]
        for dtype in ("fp32", "fp16", "bf16")
    }
    assert len(set(losses.values())) == 3
    assert abs(losses["fp16"] - losses["fp32"]) < abs(losses["bf16"] - losses["fp32"]) < 0.1


def test_gradient_accumulation_gives_the_step_of_the_larger_batch(ft, tmp_path):
    large, small = (
        ft("--batch-size", size, "--gradient-accumulation", count, "--max-steps", "2", output=tmp_path / f"{size}")[2]
        for size, count in ((8, 1), (2, 4))
    )
    assert small["held_out_loss"]["after"] == pytest.approx(large["held_out_loss"]["after"], rel=1e-5)
    assert small["tokens"] == large["tokens"]


@pytest.mark.parametrize("model", ["mini", "mini-2"])
def test_packing_trains_on_the_same_documents_with_no_padding(ft, tmp_path, model):
    packed = ft("--model", model, "--packing", "--max-length", "256", "--batch-size", "2", output=tmp_path / "packed")[
        2
    ]
    assert packed["padding_tokens"] == 0
    assert packed["held_out_loss"]["after"] < packed["held_out_loss"]["before"]
    apart = ft("--model", model, output=tmp_path / "apart")[2]
    assert packed["held_out_loss"]["before"] == pytest.approx(apart["held_out_loss"]["before"], rel=1e-4)


def test_full_batches_learn_the_same(ft, tmp_path, monkeypatch):
    """As on a GPU with CUDA graphs: what fills the batches up is no one's token, and in no loss."""
    arguments = ("--packing", "--max-length", "256", "--batch-size", "2", "--max-steps", "3")
    apart = ft(*arguments, output=tmp_path / "apart")[2]
    trainer = lambda **options: MambaTrainer(**{**options, "full_batches": True})  # noqa: E731
    monkeypatch.setattr(finetune, "MambaTrainer", trainer)
    full = ft(*arguments, output=tmp_path / "full")[2]
    assert full["padding_tokens"] > 0 == apart["padding_tokens"] and full["tokens"] == apart["tokens"]
    assert full["held_out_loss"] == pytest.approx(apart["held_out_loss"], rel=1e-4)


def test_packing_is_refused_where_documents_would_mix(ft, tiny):
    status, said, _ = ft("--model", tiny["gpt_neox"], "--preset", "all", "--packing")
    assert status == 1 and "--packing: " in said and "no Mamba or Mamba-2 mixers" in said


def test_figures_are_what_was_trained(ft, tmp_path):
    _, said, figures = ft()
    assert figures["steps"] == 4
    assert figures["tokens"] > 0 and figures["padding_tokens"] > 0
    assert figures["atps"] == pytest.approx(figures["tokens"] / figures["training_seconds"])
    assert figures["mmpt_bytes"] == pytest.approx(figures["peak_memory_bytes"] / figures["largest_mini_batch_tokens"])
    assert figures["matched_modules"] == {"embeddings": 1, "in_proj": 2, "x_proj": 2, "out_proj": 2}
    assert figures["versions"]["trl"] and figures["kernels"]["kernels"] == "torch"
    assert figures["settings"]["seed"] == 0 and figures["data"]["rows"] == 64
    assert [entry["step"] for entry in figures["loss_history"] if "loss" in entry] == [1, 2, 3, 4]
    for shown in (f"{figures['tokens']:,}", f"{figures['trainable_parameters']:,}"):
        assert shown in said


def test_kernels_can_be_named(ft, tmp_path):
    _, said, figures = ft("--kernels", "reference", "--max-steps", "1")
    assert figures["kernels"]["kernels"] == "reference" and figures["settings"]["kernels"] == "reference"
    assert "kernels: reference (asked for by name)" in said and ",kernels=reference" in said
    status, said, _ = ft("--kernels", "selective_scan=mamba_ssm", "--device", "cpu", output=tmp_path / "refused")
    assert status == 1 and "runs on cuda, not on cpu" in said


def test_the_result_of_a_full_fine_tuning_is_an_ordinary_checkpoint(ft, tmp_path):
    assert ft("--preset", "full", "--model", "mini-2")[0] == 0
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(tuned).__name__ == "Mamba2ForCausalLM" and tuned.config.use_cache
    base = AutoMambaForCausalLM.from_pretrained("mini-2").state_dict()
    changed = {name for name, weight in tuned.state_dict().items() if not torch.equal(weight, base[name])}
    assert changed == base.keys()


def test_a_rank_that_a_layer_cannot_hold_is_capped_there_and_scaled_as_elsewhere(ft, tmp_path):
    _, said, figures = ft("--preset", "all", "--r", "16", "--alpha", "32")
    assert figures["capped_ranks"] == {"dt_proj": 4}
    assert "ranks: dt_proj 4 (all that these layers hold), 16 elsewhere" in said
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"dt_proj": 4} and config["alpha_pattern"] == {"dt_proj": 8.0}


def test_the_last_line_is_a_command_that_scores_the_result(ft):
    _, said, _ = ft()
    command = shlex.split(said.strip().splitlines()[-1])
    assert command[0] == "lm_eval"
    more = ["--limit", "2", "--device", "cpu"]
    scored = subprocess.run([sys.executable, "-m", *command, *more], capture_output=True, text=True, timeout=300)
    assert scored.returncode == 0 and "aipss" in scored.stdout, scored.stderr


def test_eval_scores_the_result_and_adds_the_figures(ft):
    status, said, figures = ft("--preset", "full", "--precision", "bf16", "--eval", "mini_piqa")
    assert status == 0, said
    accuracy = figures["evaluation"]["results"]["mini_piqa"]["acc,none"]
    assert 0 <= accuracy <= 1
    assert "dtype=bf16" in figures["evaluation"]["command"] and figures["held_out_loss"]


def test_a_dry_run_says_it_all_and_does_nothing(ft, tmp_path):
    status, said, figures = ft("--preset", "all", "--precision", "fp16", "--dry-run")
    assert status == 0 and figures is None and not (tmp_path / "out").exists()
    levels = [f"memory with --recompute {level}: about" for level in ("none", "mixer", "block")]
    for part in ("learning_rate", "the recipe of", "2 dt_proj", "11,616", *levels):
        assert part in said, part


@pytest.mark.parametrize("model", ["mini", "mini-2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_of_a_tokens_activations_is_what_the_whole_model_keeps(model, precision):
    """Two layers tell what all keep: here a model of five, counted as a whole."""
    config = load_config(model)
    config.num_hidden_layers = 5
    settings = memory_settings(model, precision)
    parsed = Precision.parse(precision)
    whole = memory._kept_by(config, settings, parsed, torch.device("cpu"))
    told = memory._kept(config, settings, parsed, torch.device("cpu"))
    assert told == pytest.approx(whole, rel=0.01)
    assert told[1] > 0


def memory_settings(model: str, precision: str):
    given = {**PLAIN, "model": model, "precision": precision, "dataset": "embedded", "max_length": 96}
    return resolve(given, {}, ModelFacts("mamba", 110_000)).settings


@pytest.mark.parametrize("preset", ["full", "sll"])
def test_a_trial_of_a_batch_leaves_no_trace(monkeypatch, preset):
    """What decides on a GPU, here on the CPU, where running out of memory has to be played."""
    settings = replace(memory_settings("mini", "bf16"), preset=preset)
    loaded = models.load(settings, torch.device("cpu"))
    model, _ = models.with_adapter(loaded, settings)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random = torch.get_rng_state()
    trial = memory._Trial(model, settings, Precision.parse("bf16"), torch.device("cpu"), 1)
    assert trial(2, "none")

    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", full)
        assert not trial(2, "mixer")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="shapes"):
        patch.setattr(torch.Tensor, "backward", lambda self: torch.ones(2, 3) @ torch.ones(2, 3))
        trial(2, None)
    assert torch.equal(random, torch.get_rng_state())
    assert "forward" not in vars(loaded)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_batch_size_auto_finds_the_largest_that_fits_and_keeps_the_effective_batch(ft, monkeypatch):
    needs = memory.MemoryEstimate(0, 0, 0, 0, activations_per_token=1000)
    monkeypatch.setattr(memory, "estimate", lambda *args: needs)
    free = 5.5 * 64 * 1000 / memory.CPU_SHARE  # five and a half sequences of 64 tokens
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free})())
    arguments = ("--batch-size", "auto", "--effective-batch-size", "12", "--max-length", "64", "--max-steps", "1")
    status, said, figures = ft(*SMALL, *arguments, quick=False)
    assert status == 0, said
    settings = figures["settings"]
    assert (settings["batch_size"], settings["gradient_accumulation"]) == (4, 3)  # 5 does not divide 12
    assert "4 sequences a device, 3 forward passes a step, 12 sequences a step" in said


def test_batch_size_auto_says_when_nothing_fits(ft, monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    status, said, _ = ft(*SMALL, "--batch-size", "auto", "--max-steps", "1", quick=False)
    assert status == 1 and "not even one sequence of 512 tokens fits" in said


@pytest.mark.parametrize(("sequences", "level"), [(2.5, "none"), (1.5, "mixer"), (0.5, "block")])
def test_recompute_auto_is_the_least_that_fits_the_batch(ft, monkeypatch, sequences, level):
    """Two sequences of 64 tokens, of which each level keeps half of what the one before it does."""
    share = {"none": 1000, "mixer": 500, "block": 250}
    needs = lambda model, settings, *rest: memory.MemoryEstimate(0, 0, 0, 0, share[settings.recompute])  # noqa: E731
    monkeypatch.setattr(memory, "estimate", needs)
    free = sequences * 64 * 1000 / memory.CPU_SHARE
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free})())
    status, said, figures = ft(*SMALL, "--batch-size", "2", "--max-length", "64", "--max-steps", "1", quick=False)
    assert status == 0, said
    assert f"--recompute auto: {level}." in said and figures["settings"]["recompute"] == level


def test_every_level_of_recomputation_learns_the_same(ft, tmp_path):
    losses = []
    for level in ("none", "mixer", "block"):
        status, said, figures = ft("--recompute", level, "--dropout", "0.1", output=tmp_path / level)
        assert status == 0 and figures["settings"]["recompute"] == level, said
        losses.append(figures["held_out_loss"]["after"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "no/such-model"), "no/such-model"),
        (("--model", "./missing"), "missing"),
        (("--dataset", "./missing.jsonl"), "missing.jsonl"),
        (("--dataset", "no/such-data"), "no/such-data"),
        (("--preset", "full", "--r", "4"), "would do nothing"),
        (("--device", "cuda"), "torch sees no CUDA device"),
        (("--eval-split", "nowhere"), "nowhere"),
        (("--device", "cpu", "--cuda-graphs"), "--cuda-graphs: this runs on cpu"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(ft, tmp_path, arguments, said):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    status, output, _ = ft(*arguments)
    assert status == 1 and said in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_the_preset_that_a_family_lacks_is_named(ft, tiny):
    status, said, _ = ft("--model", tiny["gpt_neox"], "--preset", "w")
    assert status == 1 and "gpt_neox has no preset 'w'" in said


def test_a_transformer_is_trained_by_the_same_command(ft, tiny):
    status, said, figures = ft("--model", tiny["gpt_neox"], "--preset", "sll", "--learning-rate", "0.01", "--r", "2")
    assert status == 0, said
    assert figures["held_out_loss"]["after"] < figures["held_out_loss"]["before"]
    assert "embed_in" in figures["matched_modules"]


def test_without_a_name_each_run_gets_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(main, [*QUICK, "--max-steps", "1", "--preset", "w"])
    assert ran.exit_code == 0, ran.output
    (run,) = (tmp_path / "mamba-ft-runs").iterdir()
    assert re.fullmatch(r"mini-w-fp32-\d{8}-\d{6}", run.name) and (run / "run.json").is_file()
    assert where("mini") != str(run)
