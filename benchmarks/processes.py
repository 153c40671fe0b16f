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
    parser.add_argument("--docs", type=int, default=192, help="documents of each task at each shot count")
    options = scoring.parsed(parser)
    state = PartialState(cpu=options.device == "cpu")
    rank, count = state.process_index, state.num_processes
    if count < 2:
        parser.error("there is one process; start several with torchrun --standalone --nproc_per_node N")
    words = scoring.tokenizer()
    work, own = scoring.workload(options), scoring.workload(options, rank, count)
    alone = {}
    if rank == 0:
        for name, pairs in work.items():
            alone[name] = scoring.run_ours(options, words, pairs)
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
        lm = scoring.ours(options, pretrained=path, precast=options.precast)
        for name, pairs in work.items():
            together(lm, own[name])
            scoring.peak(options.device)
            took, answers = together(lm, own[name])
            of_all = gathered((own[name], answers, lm.work.run, scoring.peak(options.device)))
            if rank > 0:
                continue
            before, one, _, expected = alone[name]
            found = {pair: answer[0] for asked, got, *_ in of_all for pair, answer in zip(asked, got, strict=True)}
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
