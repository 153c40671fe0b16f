"""Scoring by prefix tree against lm-eval's `hf` backend: the same requests, the same weights, in one process.

    python benchmarks/scoring.py --model mamba-130m --work hellaswag mmlu --shots 0 5 --docs 256
    python benchmarks/scoring.py --model mamba2-1.3b --work icl_gap --docs 32
    python benchmarks/scoring.py --model mini --work icl_gap_mini --device cpu

Requests have the shape of a task's, in words drawn at random; weights are drawn at random too, at real size. The peer
has bf16 weights (`--dtype` for another) and the best of `--peer-batch-sizes`; ours has fp32 weights under autocast to
the same, with `--precast` cast once, as `precast=True` does. Both tokenize within the time. Peak memory includes the
weights.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import random
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers

from lm_eval_mamba.backend import MambaAMP
from lm_eval_mamba.scoring.lm import PrefixTreeLM
from peft_mamba import precast_frozen_weights, use_mixers

VOCABULARY = 50280
MAMBA = {"mamba-130m": (768, 24), "mamba-370m": (1024, 48), "mamba-790m": (1536, 48), "mamba-1.4b": (2048, 48)}
MAMBA |= {"mamba-2.8b": (2560, 64)}
MAMBA2 = {name.replace("mamba", "mamba2"): sizes for name, sizes in MAMBA.items()}
MAMBA2["mamba2-1.3b"] = MAMBA2.pop("mamba2-1.4b")
EMBEDDED = {"mini", "mini-2"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """What the requests of a task look like, in words: a range each, drawn a document.

    shared_shots: documents of a subject have the same shots; else each document has its own.
    fork: the choices differ before the end of the context already (WinoGrande).
    """

    question: tuple[int, int]
    shot: tuple[int, int]
    answer: tuple[int, int]
    choices: int
    shared_shots: bool = False
    fork: bool = False


SHAPES = {
    "hellaswag": Shape((40, 80), (80, 104), (15, 35), 4),
    "mmlu": Shape((60, 140), (100, 120), (1, 1), 4, shared_shots=True),
    "piqa": Shape((12, 30), (30, 50), (10, 30), 2),
    "arc_easy": Shape((20, 40), (25, 45), (2, 8), 4),
    "arc_challenge": Shape((20, 40), (25, 45), (2, 8), 4),
    "winogrande": Shape((10, 20), (20, 28), (4, 10), 2, fork=True),
}
ICL_GAP = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")
DOCUMENTS_OF_A_SUBJECT = 246  # MMLU has 14,042 in 57


def tokenizer(vocabulary: int = VOCABULARY) -> transformers.PreTrainedTokenizerFast:
    words = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, vocabulary - 3)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end)


def build(name: str, device: str, dtype: torch.dtype) -> Any:
    """A model of this size with random weights, the same at every call."""
    if name in EMBEDDED:
        path = Path(str(files("peft_mamba"))) / "embedded" / name
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device, dtype).eval()
    torch.manual_seed(0)
    if name in MAMBA:
        hidden, layers = MAMBA[name]
        config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers)
        kind: Any = transformers.MambaForCausalLM
    else:
        hidden, layers = MAMBA2[name]
        own = {"state_size": 128, "head_dim": 64, "num_heads": 2 * hidden // 64, "n_groups": 1, "chunk_size": 256}
        config = transformers.Mamba2Config(
            vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, tie_word_embeddings=True, **own
        )
        kind = transformers.Mamba2ForCausalLM
    with torch.device(device):
        model = kind(config)
    return model.to(dtype).eval()


def requests(task: str, shots: int, documents: int, first: int = 0, step: int = 1) -> list[tuple[str, str]]:
    """(context, continuation) of each answer of each document, or of every step-th from the first on."""
    shape, rng = SHAPES[task], random.Random(f"{task} {shots} 0")

    def words(between: tuple[int, int]) -> str:
        return " ".join(f"w{rng.randrange(1, VOCABULARY - 3)}" for _ in range(rng.randint(*between)))

    made, subject = [], ""
    for document in range(documents):
        if not shape.shared_shots or document % DOCUMENTS_OF_A_SUBJECT == 0:
            subject = "".join(words(shape.shot) + "\n\n" for _ in range(shots))
        context = subject + words(shape.question)
        answer = words(shape.answer)
        for _ in range(shape.choices):
            if shape.fork:
                pair = f"{context} {words((1, 2))}", " " + answer
            else:
                pair = context, " " + words(shape.answer)
            if document % step == first:
                made.append(pair)
    return made


def workload(options: Any, first: int = 0, step: int = 1) -> dict[str, list[tuple[str, str]]]:
    """By its name in the table, what is asked for by --work, --shots and --docs, but icl_gap_mini: `requests`."""
    work: dict[str, list[tuple[str, str]]] = {}
    for name in options.work:
        if name == "icl_gap":
            named = [(task, shots) for task in ICL_GAP for shots in (0, 1, 3, 5)]
            work[name] = [r for task, shots in named for r in requests(task, shots, options.docs, first, step)]
        elif name != "icl_gap_mini":
            for shots in options.shots:
                work[f"{name}, {shots}-shot"] = requests(name, shots, options.docs, first, step)
    return work


class Recorder(LM):
    """Takes a task's requests and answers none."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[str, str]] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.requests += [request.args for request in requests]
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: Any) -> Any:
        raise NotImplementedError

    generate_until = loglikelihood_rolling


def embedded_benchmark(limit: int | None) -> list[tuple[str, str]]:
    """The requests of icl_gap_mini."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(files("lm_eval_mamba.tasks")), include_defaults=False)
    recorder = Recorder()
    lm_eval.simple_evaluate(recorder, tasks=["icl_gap_mini"], task_manager=manager, limit=limit, bootstrap_iters=0)
    return recorder.requests


def seconds(lm: Any, work: list[tuple[str, str]]) -> tuple[float, list[tuple[float, bool]]]:
    instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(work)]
    start = time.perf_counter()
    answers = lm.loglikelihood(instances, disable_tqdm=True)
    return time.perf_counter() - start, answers


def peak(device: str) -> float:
    """GiB at most since the last call."""
    if device != "cuda":
        return math.nan
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return most


def clear(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_peer(options: Any, words: Any, name: str, work: list[tuple[str, str]]) -> tuple[float, int, float, list]:
    """(seconds, batch size, GiB, answers) of the peer at the batch size that does best on a part of the work."""
    model = build(options.model, options.device, DTYPES[options.dtype])
    part = work[:: max(1, len(work) // options.trial)]
    best: tuple[float, int] | None = None
    for size in options.peer_batch_sizes:
        lm = HFLM(pretrained=model, tokenizer=words, backend="causal", batch_size=size)
        try:
            seconds(lm, part[:size])
            took, _ = seconds(lm, part)
        except torch.OutOfMemoryError:
            print(f"  {name}: the peer has no memory for batches of {size}", flush=True)
            clear(options.device)
            continue
        if best is None or took < best[0]:
            best = took, size
    assert best is not None, "the peer runs out of memory at every batch size"
    clear(options.device)
    lm = HFLM(pretrained=model, tokenizer=words, backend="causal", batch_size=best[1])
    took, answers = seconds(lm, work)
    return took, best[1], peak(options.device), answers


def ours(options: Any, **given: Any) -> PrefixTreeLM:
    return MambaAMP(
        backend="causal",
        dtype=options.dtype,
        state_budget=options.state_budget,
        batch_tokens=options.batch_tokens,
        device=options.device,
        **given,
    )


def run_ours(options: Any, words: Any, work: list[tuple[str, str]]) -> tuple[float, Any, float, list]:
    """(seconds, tokens, GiB, answers)."""
    model = build(options.model, options.device, torch.float32)
    held = contextlib.ExitStack()
    if options.precast:
        use_mixers(model.requires_grad_(False))
        held.enter_context(precast_frozen_weights(model, options.dtype))
        held.callback(model.to, "cpu")  # where the fp32 weights then stay
    lm = ours(options, pretrained=model, tokenizer=words)
    # On a GPU all of it once before, so that no kernel is compiled within the time; the peer has had its trials.
    seconds(lm, work if options.device == "cuda" else work[: max(64, len(work) // 8)])
    peak(options.device)
    took, answers = seconds(lm, work)
    memory = peak(options.device)
    held.close()
    return took, lm.work, memory, answers


def parsed(parser: argparse.ArgumentParser) -> Any:
    """The command line, with the options of ours added."""
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 5], help="of each task; icl_gap has its own")
    parser.add_argument("--dtype", default=None, choices=DTYPES, help="default bf16 on cuda, fp32 on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precast", action="store_true", help="on the device ours has the cast weights alone")
    parser.add_argument("--state-budget", default=None, help="memory for states, as 2GiB; default: what is free")
    parser.add_argument("--batch-tokens", type=int, default=None, help="of ours; default: what memory allows")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mamba-130m", choices=[*MAMBA, *MAMBA2, *sorted(EMBEDDED)])
    names = [*SHAPES, "icl_gap", "icl_gap_mini"]
    parser.add_argument("--work", nargs="+", default=["hellaswag", "mmlu"], choices=names)
    parser.add_argument("--docs", type=int, default=256, help="documents of each task at each shot count")
    parser.add_argument("--peer-batch-sizes", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--trial", type=int, default=256, help="requests to find the peer's batch size with")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the fastest counts")
    options = parsed(parser)
    words: Any = tokenizer()
    if options.model in EMBEDDED:
        words = transformers.AutoTokenizer.from_pretrained(Path(str(files("peft_mamba"))) / "embedded" / options.model)
    work = workload(options)
    if "icl_gap_mini" in options.work:
        limit = None if options.docs == parser.get_default("docs") else options.docs
        work["icl_gap_mini"] = embedded_benchmark(limit)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{options.model}, {options.dtype}, {where}; requests per second", flush=True)
    print("| work | requests | tokens asked | run | hf (batch) | ours | speed-up | GiB: hf | ours | difference |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, pairs in work.items():
        peer = min((run_peer(options, words, name, pairs) for _ in range(options.repeat)), key=lambda run: run[0])
        clear(options.device)
        ours = min((run_ours(options, words, pairs) for _ in range(options.repeat)), key=lambda run: run[0])
        clear(options.device)
        difference = sum(abs(a - b) for (a, _), (b, _) in zip(ours[3], peer[3], strict=True)) / len(pairs)
        print(
            f"| {name} | {len(pairs)} | {ours[1].asked} | {ours[1].run} | {len(pairs) / peer[0]:.0f} ({peer[1]}) "
            f"| {len(pairs) / ours[0]:.0f} | {peer[0] / ours[0]:.2f} | {peer[2]:.1f} | {ours[2]:.1f} "
            f"| {difference:.2g} nats |",
            flush=True,
        )


if __name__ == "__main__":
    main()
