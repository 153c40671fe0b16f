"""Scoring by several processes, a GPU each, against one of them alone: the same requests, the same weights.

    torchrun --standalone --nproc_per_node 2 benchmarks/processes.py --model mamba-1.4b --docs 192 --precast

Weights, requests and precision are those of scoring.py. As by lm-eval, each process is dealt every n-th document;
together they score one tree. Timed from a barrier to the barrier behind the last answer; all of it runs once before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import scoring
import torch
import torch.distributed as dist
from accelerate import PartialState

from lm_eval_mamba.backend import MambaAMP


def together(lm: Any, own: list[tuple[str, str]]) -> tuple[float, list]:
    """(seconds of all processes, the answers to this one's requests)."""
    dist.barrier()
    start = time.perf_counter()
    _, answers = scoring.seconds(lm, own)
    dist.barrier()
    return time.perf_counter() - start, answers


def gathered(own: Any) -> list[Any]:
    """What each process has, by rank."""
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, own)
    return of_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mamba-1.4b", choices=[*scoring.MAMBA, *scoring.MAMBA2])
    parser.add_argument("--work", nargs="+", default=["hellaswag", "mmlu"], choices=[*scoring.SHAPES, "icl_gap"])
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 5], help="of each but icl_gap, which has its own")
    parser.add_argument("--docs", type=int, default=192, help="documents of each task at each shot count")
    parser.add_argument("--dtype", default=None, choices=scoring.DTYPES, help="default bf16 on cuda, fp32 on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precast", action="store_true", help="the device has the cast weights alone")
    parser.add_argument("--state-budget", default=None)
    parser.add_argument("--batch-tokens", type=int, default=None)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    state = PartialState(cpu=options.device == "cpu")
    rank, count = state.process_index, state.num_processes
    if count < 2:
        parser.error("there is one process; start several with torchrun --standalone --nproc_per_node N")
    words = scoring.tokenizer()
    work = {
        name if name == "icl_gap" else f"{name}, {shots}-shot": (name, shots, options.docs)
        for name in options.work
        for shots in options.shots
    }
    alone = {}
    if rank == 0:
        for name, shape in work.items():
            alone[name] = scoring.run_ours(options, words, scoring.requests_of(*shape))
            scoring.clear(options.device)
        where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads each"
        print(f"{options.model}, {options.dtype}, {where}; requests per second", flush=True)
        print(f"| work | requests | one process | {count} | speed-up | tokens run | by {count} | GiB | differ by |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        (path,) = {each for each in gathered(directory if rank == 0 else None) if each}
        if rank == 0:
            scoring.build(options.model, options.device, torch.float32).save_pretrained(path)
            words.save_pretrained(path)
        dist.barrier()
        lm = MambaAMP(
            pretrained=path,
            backend="causal",
            dtype=options.dtype,
            precast=options.precast,
            state_budget=options.state_budget,
            batch_tokens=options.batch_tokens,
            device=options.device,
        )
        for name, shape in work.items():
            own = scoring.requests_of(*shape, rank, count)
            together(lm, own)
            scoring.peak(options.device)
            took, answers = together(lm, own)
            of_all = gathered((own, answers, lm.work.run, scoring.peak(options.device)))
            if rank > 0:
                continue
            before, one, _, expected = alone[name]
            pairs = scoring.requests_of(*shape)
            found = {pair: answer[0] for own, answers, *_ in of_all for pair, answer in zip(own, answers, strict=True)}
            worst = max(abs(found[pair] - x) / abs(x) for pair, (x, _) in zip(pairs, expected, strict=True))
            print(
                f"| {name} | {len(pairs)} | {len(pairs) / before:.0f} | {len(pairs) / took:.0f} | {before / took:.2f} "
                f"| {one.run} | {sum(run for *_, run, _ in of_all)} | {max(peak for *_, peak in of_all):.1f} "
                f"| {worst:.1g} of it |",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
