"""Fine-tuning at real size: tokens per second (ATPS) and memory per token (MMPT) of the papers' nine configurations.

    python benchmarks/finetune.py mamba-790m mamba2-780m

{full, all, sll} x {fp32, fp16, bf16} through `mamba-ft` on one GPU: random weights at the real size, sequences of 512
real tokens, the papers' r. Beside them transformers' own mixers under the same trainer: full fine-tuning in fp32 and
bf16 (accelerate's mixed precision), which is what one gets without this package. The first step, in which kernels are
compiled and tuned, is not timed. fp32 is fp32 in ours, without TF32; transformers' own Mamba-2 multiplies fp32 in TF32
inside mamba-ssm's Triton kernels.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import string
import sys
import tempfile
import time
from pathlib import Path

import click
import datasets
import torch
import transformers
import trl
from lm_eval_mamba.cli.ft import main as mamba_ft
from sizes import CONFIGS, random_model
from transformers import AutoTokenizer, TrainerCallback

from peft_mamba import checkpoints

BATCH, LENGTH, STEPS = 16, 512, int(os.environ.get("STEPS", "8"))
# 2406.00209: Mamba 790M, Alpaca, one 24 GB A10G, against FP32 full fine-tuning; the mean over its configurations.
PUBLISHED = "published (Mamba 790M, A10G, batch tuned): 2.15x tokens per second, 62.7% less memory per token"


def write_data(path: Path) -> None:
    """Documents that are longer than LENGTH tokens in any byte-level tokenizer."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(BATCH * (STEPS + 1)):
            text = " ".join("".join(rng.choices(string.ascii_letters, k=5)) for _ in range(LENGTH))
            stream.write(json.dumps({"text": text}) + "\n")


def write_checkpoint(directory: Path, config) -> None:
    model = random_model(config, "cuda")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(checkpoints.resolve("mini")).save_pretrained(directory)


def run_ours(model: Path, data: Path, preset: str, precision: str, r: int) -> dict:
    out = Path(tempfile.mkdtemp()) / "out"
    arguments = ["--model", model, "--dataset", data, "--preset", preset, "--precision", precision, "-o", out]
    arguments += ["--batch-size", BATCH, "--max-length", LENGTH, "--max-steps", STEPS, "--save-steps", 0]
    if preset != "full":
        arguments += ["--r", r]
    try:
        mamba_ft([str(each) for each in arguments], standalone_mode=False)
    except SystemExit as end:
        if end.code:
            raise
    figures = json.loads((out / "run.json").read_text(encoding="utf-8"))
    shutil.rmtree(out.parent)
    assert figures["padding_tokens"] == 0
    return {"rate": figures["atps_after_first_step"], "memory": figures["mmpt_bytes"], "kernels": figures["kernels"]}


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        torch.cuda.synchronize()
        self.steps.append(time.perf_counter())


def run_transformers(model: Path, data: Path, bf16: bool) -> dict:
    out = tempfile.mkdtemp()
    clock = Clock()
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, device_map={"": 0}),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=datasets.load_dataset("json", data_files=str(data), split="train"),
        args=trl.SFTConfig(
            output_dir=out,
            bf16=bf16,
            tf32=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=BATCH,
            max_length=LENGTH,
            max_steps=STEPS,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        callbacks=[clock],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    tokens = BATCH * LENGTH
    rate = tokens * (len(clock.steps) - 1) / (clock.steps[-1] - clock.steps[0])
    return {"rate": rate, "memory": torch.cuda.max_memory_allocated() / tokens}


def show(name: str, figures: dict, base: dict | None) -> None:
    line = f"{name:<34} {figures['rate']:>9,.0f} tokens/s  {figures['memory'] / 1e6:>6.3f} MB/token"
    if base is not None:
        line += f"  {figures['rate'] / base['rate']:>6.2f}x  {1 - figures['memory'] / base['memory']:>7.1%} less memory"
    print(line, flush=True)


def main(names: list[str]) -> None:
    lines: list[tuple[str, dict, dict | None]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data.jsonl"
        write_data(data)
        for name in names:
            config, r = CONFIGS[name]
            model = Path(scratch) / name
            write_checkpoint(model, config)
            base = None
            for precision in ("fp32", "bf16", "fp16"):
                for preset in ("full", "all", "sll"):
                    gc.collect()
                    torch.cuda.empty_cache()
                    try:
                        figures = run_ours(model, data, preset, precision, r)
                    except click.ClickException as error:
                        print(f"{name} {preset} {precision}: {error.message}", flush=True)
                        continue
                    base = base or figures
                    lines.append((f"{name} {preset} {precision}", figures, base))
                    show(*lines[-1])
            for bf16 in (False, True):
                gc.collect()
                torch.cuda.empty_cache()
                try:
                    figures = run_transformers(model, data, bf16)
                except RuntimeError as error:
                    print(f"{name}: transformers, full, {'bf16' if bf16 else 'fp32'}: {error}")
                    continue
                lines.append((f"{name} transformers full {'bf16' if bf16 else 'fp32'}", figures, base))
                show(*lines[-1])
            shutil.rmtree(model)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {BATCH} x {LENGTH}, {STEPS} steps")
    for line in lines:
        show(*line)
    print(PUBLISHED)


if __name__ == "__main__":
    main(sys.argv[1:] or ["mamba-790m", "mamba2-780m"])
