"""Mamba-130m and Mamba2-130m on the CPU: transformers' mixers against ours, same weights, one process.

    python benchmarks/cpu_forward.py
    python benchmarks/cpu_forward.py --training --layers 4

Random weights at the real size, fp32, 4 x 256 fresh random tokens each time: a forward, or with --training a forward
with loss and its backward through all weights. The two take turns, so that other work on the machine hits both alike;
printed are medians over the turns after one warm-up, and the median and range of the ratio of each turn.
"""

import argparse
import copy
import platform
import statistics
import time

import torch
import transformers

from peft_mamba import use_mixers

BATCH, LENGTH, VOCABULARY = 4, 256, 50280
CONFIGS = {
    "mamba-130m": transformers.MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, state_size=16),
    "mamba2-130m": transformers.Mamba2Config(
        vocab_size=50288, hidden_size=768, num_hidden_layers=24, state_size=128, num_heads=24, head_dim=64, n_groups=1
    ),
}


def seconds(model: torch.nn.Module, tokens: torch.Tensor, training: bool) -> float:
    start = time.perf_counter()
    if training:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    else:
        with torch.inference_mode():
            model(tokens, use_cache=False)
    elapsed = time.perf_counter() - start
    model.zero_grad()
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", action="store_true", help="time forward, loss and backward")
    parser.add_argument("--model", choices=CONFIGS, action="append", help="default: both, one after the other")
    parser.add_argument("--layers", type=int, default=24, help="fewer fit training into less memory")
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    work = "forward and backward" if arguments.training else "forward"
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, fp32, {arguments.layers} layers, {work}, "
        f"{BATCH} x {LENGTH} tokens, {arguments.turns} turns"
    )
    for name in arguments.model or CONFIGS:
        config = copy.deepcopy(CONFIGS[name])
        config.num_hidden_layers = arguments.layers
        theirs = transformers.AutoModelForCausalLM.from_config(config).train(arguments.training)
        ours = copy.deepcopy(theirs)
        use_mixers(ours)
        turns = []
        for _ in range(arguments.turns + 1):
            tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
            turns.append([seconds(model, tokens, arguments.training) for model in (theirs, ours)])
        peer, mine = (BATCH * LENGTH / statistics.median(column) for column in zip(*turns[1:], strict=True))
        ratios = sorted(peer_seconds / our_seconds for peer_seconds, our_seconds in turns[1:])
        print(
            f"{name}: transformers {peer:.0f} tokens/s, ours {mine:.0f} tokens/s, "
            f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
