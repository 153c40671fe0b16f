"""A LoRA step: transformers + PEFT + mamba-ssm against ours, tokens per second and peak memory per token.

    python benchmarks/lora_step.py                              # mamba-790m, batch 16 x 512, bf16
    python benchmarks/lora_step.py --model mamba2-780m
    python benchmarks/lora_step.py --arms ours-sll-bf16:block --profile
    python benchmarks/lora_step.py --lengths alpaca             # packed against padded
    python benchmarks/lora_step.py --scaling --model mamba-130m # length 512 to 65,536 at equal tokens
    python benchmarks/lora_step.py --fit                        # 2.8B and 2.7B within 24 GB

An arm is KIND-WHAT-PRECISION[:RECOMPUTE[+graphs][+precast]]. KIND is ours, or stock: transformers' mixers, PEFT's
own tuner, TRL's own head. WHAT is full, or a LoRA: of stock the modules that plain PEFT permits on these families
(`lora`), of ours the `sll` preset, which has out_proj as well. PRECISION is fp32 weights under autocast for both.
RECOMPUTE is what our blocks make again in backward: none, mixer or block; with +graphs the layers are CUDA graphs, and
packed batches filled up to one size; with +precast frozen weights are on the device in half precision alone.

All arms take the same step: the loss of TRL's trainers, backward, the norm of the gradient clipped,
AdamW. Weights and tokens are random. The first steps, which compile and tune kernels, are not timed; the time is the
median of the rest, memory the peak of all that is allocated, weights and optimizer included, and with graphs all that
torch has reserved, since nothing counts what is in use within them. fp32 is without TF32, but
for what mamba-ssm's Triton kernels do.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import click
import peft
import torch
from datasets import Dataset
from lm_eval_mamba.cli import fused_head
from lm_eval_mamba.cli.packed import FILLER, FullBatches
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from sizes import CONFIGS, random_model
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

import peft_mamba
from peft_mamba.mixers.recomputation import DEFAULT, LEVELS, recompute
from peft_mamba.precision import Precision

STOCK_MODULES = {"mamba": ["in_proj", "x_proj", "embeddings"], "mamba2": ["in_proj", "embeddings"]}
FULL_STOCK, FULL_OURS, STOCK = "stock-full-fp32", "ours-full-fp32:none", "stock-lora-bf16"
OURS = [f"ours-sll-bf16:{level}" for level in ("none+graphs+precast", "block+graphs+precast", *LEVELS)]
EXTRAS = ("graphs", "precast")
# Tokens per second over stock's, by family; over either full fp32; the share of stock's full fp32 memory per token;
# packed over padded; bytes of the largest models; time of long sequences over that of short ones.
GOALS = {"mamba": 3.0, "mamba2": 2.5}
GOAL_FULL, GOAL_MEMORY, GOAL_PACKED, GOAL_FIT, GOAL_FLAT = 10.0, 0.2, 2.0, 24e9, 1.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Figures:
    """One arm: seconds a step (median), tokens a step that are not padding, bytes at the peak."""

    seconds: float
    tokens: int
    peak: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def memory(self) -> float:
        return self.peak / self.tokens

    def __str__(self) -> str:
        return (
            f"{self.rate:>9,.0f} tokens/s  {self.seconds * 1e3:>8.1f} ms/step  {self.memory / 1e6:>6.3f} MB/token  "
            f"peak {self.peak / 1e9:>6.2f} GB"
        )


@contextlib.contextmanager
def stock_tuner() -> Iterator[None]:
    """PEFT as it is without peft_mamba."""
    ours = PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA]
    PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] = LoraModel
    try:
        yield
    finally:
        PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] = ours


def build(config: Any, arm: str, r: int, held: contextlib.ExitStack) -> tuple[Any, Precision]:
    """The model of an arm, ready to train until `held` ends, and its precision."""
    arm, _, level = arm.partition(":")
    level, *extras = level.split("+")
    if unknown := set(extras) - set(EXTRAS):
        raise click.BadParameter(f"+{unknown.pop()} is nothing that an arm can have: there are {', '.join(EXTRAS)}.")
    kind, what, precision = arm.split("-")
    model = random_model(config, DEVICE)
    add_head = fused_head.add_fused_lm_head if kind == "ours" else add_fused_lm_head
    add_head(model, outputs=fused_head.SFT_OUTPUTS)  # as SFTTrainer does
    if kind == "ours":
        peft_mamba.use_mixers(model)
        if what != "full":
            model = peft.get_peft_model(model, peft_mamba.MambaLoraConfig(preset=what, r=r, lora_alpha=2 * r))
        recompute(model, level or DEFAULT)
        if "graphs" in extras:
            peft_mamba.use_cuda_graphs(model)
    elif what != "full":
        modules = STOCK_MODULES[config.model_type]
        with stock_tuner():
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=modules, r=r, lora_alpha=2 * r))
    model.train()
    if "precast" in extras:
        held.enter_context(peft_mamba.precast_frozen_weights(model, precision))
        held.callback(model.to, "cpu")  # where the originals then stay: on the device there may be no room
    return model, Precision.parse(precision)


class Step:
    """forward, backward and AdamW on one batch after another."""

    def __init__(self, model: Any, precision: Precision) -> None:
        self.model, self.precision = model, precision
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=DEVICE == "cuda")

    def __call__(self, batch: dict[str, Any]) -> None:
        with self.precision.scope(torch.device(DEVICE)):
            loss = self.model(**batch, fused_lm_head=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def measure(step: Step, batches: list[dict[str, Any]], warmup: int, graphs: bool = False) -> Figures:
    """Over the batches behind the first `warmup`: the median of equal batches, the mean of batches that differ."""
    seconds, tokens = [], []
    for index, batch in enumerate(batches):
        batch = {name: each.to(DEVICE) if isinstance(each, torch.Tensor) else each for name, each in batch.items()}
        mask = batch.get("attention_mask")
        real = (batch["input_ids"].numel() if mask is None else int(mask.sum())) - batch.pop(FILLER, 0)
        if index == warmup and DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        step(batch)
        synchronize()
        if index >= warmup:
            seconds.append(time.perf_counter() - start)
            tokens.append(real)
    peak = 0
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_reserved() if graphs else torch.cuda.max_memory_allocated()
    typical = statistics.median if len(set(tokens)) == 1 else statistics.mean
    return Figures(typical(seconds), round(statistics.mean(tokens)), peak)


def random_batches(config: Any, count: int, rows: int, length: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(config.vocab_size, (rows, length), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in batches]


def run(config: Any, arm: str, r: int, batches: list[dict[str, Any]], warmup: int) -> Figures:
    free()
    held = contextlib.ExitStack()
    model, precision = build(config, arm, r, held)
    try:
        with held:
            return measure(Step(model, precision), batches, warmup, "graphs" in arm)
    finally:
        del model
        free()


def try_run(*args: Any) -> Figures | None:
    try:
        return run(*args)
    except torch.OutOfMemoryError:
        print(f"{args[1]:<35} out of memory", flush=True)
        return None


def verdict(value: float, goal: float, at_most: bool = False) -> str:
    good = value <= goal if at_most else value >= goal
    return f"{'reached' if good else 'missed'} (goal {'at most' if at_most else 'at least'} {goal:g})"


def compare(config: Any, arms: tuple[str, ...], r: int, batches: list[dict[str, Any]], warmup: int) -> None:
    results: dict[str, Figures] = {}
    for arm in arms:
        if (figures := try_run(config, arm, r, batches, warmup)) is not None:
            results[arm] = figures
            print(f"{arm:<35} {figures}", flush=True)
    for arm, figures in results.items():
        if not arm.startswith("ours-") or "-full-" in arm:
            continue
        if base := results.get(STOCK):
            ratio = figures.rate / base.rate
            print(f"{arm}: {ratio:.2f}x {STOCK}'s tokens/s, {verdict(ratio, GOALS[config.model_type])}")
        for name in (FULL_STOCK, FULL_OURS):
            if base := results.get(name):
                speed = figures.rate / base.rate
                print(f"{arm}: {speed:.2f}x {name}'s tokens/s, {verdict(speed, GOAL_FULL)}")
                if base.peak:
                    memory = figures.memory / base.memory
                    print(f"{arm}: {memory:.1%} of {name}'s bytes a token, {verdict(memory, GOAL_MEMORY, True)}")


def alpaca_like(count: int) -> list[int]:
    """Tokens of documents: log-normal with a mean of about 100, cut to 5 … 512."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(count).log_normal_(4.35, 0.7, generator=generator)
    return lengths.round().clamp(5, 512).int().tolist()


def compare_packing(config: Any, arm: str, r: int, rows: int, steps: int, warmup: int) -> None:
    """The same documents, `rows` a batch padded to the longest, and packed into `rows` x 512 tokens by TRL."""
    lengths = alpaca_like(rows * (steps + warmup) * 5)
    print(f"{len(lengths)} documents, {min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.1f}")
    generator = torch.Generator().manual_seed(1)
    documents = [
        {"input_ids": torch.randint(1, config.vocab_size, (length,), generator=generator).tolist()}
        for length in lengths
    ]
    packed = pack_dataset(Dataset.from_list(documents), 512, "bfd", {"load_from_cache_file": False})
    packed = packed.shuffle(seed=0, load_from_cache_file=False)
    count = steps + warmup

    def batches(rows_of: Any, padding_free: bool) -> list[dict[str, Any]]:
        collate: Any = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
        groups = [[rows_of[i] for i in range(n * rows, (n + 1) * rows)] for n in range(count)]
        if padding_free and "graphs" in arm:
            collate = FullBatches(collate, rows, 512, 0)
        return [collate(group) for group in groups if len(group) == rows]

    padded = try_run(config, arm, r, batches(documents, False), warmup)
    if padded is not None:
        print(f"{arm} padded  {padded}", flush=True)
    full = len(packed) // rows
    count = min(count, full)
    dense = try_run(config, arm, r, batches(packed, True), warmup)
    if dense is not None:
        print(f"{arm} packed  {dense}", flush=True)
    if padded is not None and dense is not None:
        ratio = dense.rate / padded.rate
        print(f"packed: {ratio:.2f}x padded's real tokens/s, {verdict(ratio, GOAL_PACKED)}")


def scale(config: Any, arm: str, r: int, tokens: int, steps: int, warmup: int) -> None:
    """Length 512 to `tokens` at `tokens` a step, then what further tokens of one row take."""
    length, first = 512, None
    while length <= tokens:
        figures = try_run(config, arm, r, random_batches(config, steps + warmup, tokens // length, length), warmup)
        if figures is not None:
            first = first or figures
            time_of, memory = figures.seconds / first.seconds, figures.peak / max(first.peak, 1)
            print(
                f"{arm} {tokens // length:>4} x {length:<6} {figures}  time {time_of:.3f}x of the first, "
                f"{verdict(time_of, GOAL_FLAT, True)}, memory {memory:.3f}x",
                flush=True,
            )
        length *= 4 if length < tokens // 4 else 2
    length, before = 2048, None
    while length <= tokens:
        figures = try_run(config, arm, r, random_batches(config, warmup + 1, 1, length), warmup)
        if figures is not None and before is not None:
            more = (figures.peak - before.peak) / (figures.tokens - before.tokens)
            print(f"{arm}    1 x {length:<6} {more / 1e3:>8.1f} kB a token beyond the length before", flush=True)
        before = figures
        length *= 2


def fit(names: tuple[str, ...], arm: str, length: int) -> None:
    """The peak of a step at 2.8B and 2.7B for growing batches, until it leaves 24 GB."""
    for name in names:
        config, r = CONFIGS[name]
        rows = 1
        while True:
            free()
            figures = try_run(config, arm, r, random_batches(config, 3, rows, length), 1)
            if figures is None:
                break
            print(f"{name} {arm} r {r}, {rows:>3} x {length}  {figures}", flush=True)
            if rows == 1 and DEVICE == "cuda":
                print(f"{name}: {figures.peak / 1e9:.1f} GB, {verdict(figures.peak, GOAL_FIT, True)}")
            if figures.peak > GOAL_FIT or rows >= 16:
                break
            rows *= 2


def profile(
    config: Any, arm: str, r: int, batches: list[dict[str, Any]], warmup: int, held: contextlib.ExitStack
) -> None:
    """The kernels that a step spends its time in."""
    from torch.profiler import ProfilerActivity, profile

    model, precision = build(config, arm, r, held)
    step = Step(model, precision)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    measure(step, batches[: warmup + 1], warmup)
    batch = {name: each.to(DEVICE) for name, each in batches[0].items()}
    with profile(activities=activities) as trace:
        step(batch)
        synchronize()
    events = trace.key_averages()
    by_time: Callable[[Any], float] = lambda event: event.self_device_time_total  # noqa: E731
    if DEVICE == "cpu":
        by_time = lambda event: event.self_cpu_time_total  # noqa: E731
    kernels = [event for event in events if DEVICE == "cpu" or event.device_type.name == "CUDA"]
    total = sum(map(by_time, kernels))
    print(f"{arm}: {sum(event.count for event in kernels):,} kernels, {total / 1e3:.1f} ms in them")
    for event in sorted(kernels, key=by_time, reverse=True)[:40]:
        print(f"{by_time(event) / 1e3:>9.2f} ms {by_time(event) / total:>6.1%} {event.count:>6}x  {event.key[:140]}")
    host = sorted((event for event in events if event.count), key=lambda event: -event.self_cpu_time_total)[:15]
    print("host time:")
    for event in host:
        print(f"{event.self_cpu_time_total / 1e3:>9.2f} ms {event.count:>6}x  {event.key[:140]}")


@click.command()
@click.option("--model", "name", type=click.Choice(list(CONFIGS)), default="mamba-790m", show_default=True)
@click.option("--layers", type=int, help="Fewer layers than the model has, for a look.")
@click.option("--arms", help="Separated by commas. [default: all that the goals speak of]")
@click.option("--batch-size", "rows", default=16, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--r", type=int, help="Rank. [default: the papers', by model]")
@click.option("--steps", default=8, show_default=True)
@click.option("--warmup", default=3, show_default=True)
@click.option("--lengths", type=click.Choice(["equal", "alpaca"]), default="equal", show_default=True)
@click.option("--scaling", is_flag=True)
@click.option("--tokens", default=65536, show_default=True, help="A step, with --scaling.")
@click.option("--fit", "fits", is_flag=True)
@click.option("--profile", "profiles", is_flag=True, help="Also where the time of the first arm of ours goes.")
def main(name, layers, arms, rows, length, r, steps, warmup, lengths, scaling, tokens, fits, profiles) -> None:
    config, rank = CONFIGS[name]
    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
    r = r or rank
    chosen = tuple(arms.split(",") if arms else (STOCK, *OURS, FULL_OURS, FULL_STOCK))
    ours = next((arm for arm in chosen if arm.startswith("ours-")), OURS[0])
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    print(f"{card}, torch {torch.__version__}; kernels {peft_mamba.kernels.describe(DEVICE)}", flush=True)
    if fits:
        fit(("mamba-2.8b", "mamba2-2.7b"), ours if arms else f"{OURS[-1]}+precast", length)
        return
    print(f"{name}, {config.num_hidden_layers} layers, r {r}, batch {rows} x {length}", flush=True)
    if scaling:
        scale(config, ours, r, tokens, steps, warmup)
    elif lengths == "alpaca":
        compare_packing(config, ours, r, rows, steps, warmup)
    else:
        batches = random_batches(config, steps + warmup, rows, length)
        compare(config, chosen, r, batches, warmup)
        if profiles:
            free()
            with contextlib.ExitStack() as held:
                profile(config, ours, r, batches, warmup, held)


if __name__ == "__main__":
    main()
