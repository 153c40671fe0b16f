"""Forward of mamba-130m and mamba2-130m on the CPU: transformers' mixers against ours, same weights, one process.

    python benchmarks/cpu_forward.py

Random weights at the real size, fp32, 4 x 256 fresh random tokens each time; the median of 5 after one warm-up.
"""

import copy
import platform
import statistics
import time

import torch
import transformers

from peft_mamba import use_mixers

BATCH, LENGTH, RUNS = 4, 256, 5
CONFIGS = {
    "mamba-130m": transformers.MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, state_size=16),
    "mamba2-130m": transformers.Mamba2Config(
        vocab_size=50288, hidden_size=768, num_hidden_layers=24, state_size=128, num_heads=24, head_dim=64, n_groups=1
    ),
}


def seconds(model: torch.nn.Module) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(RUNS + 1):
            tokens = torch.randint(0, 50280, (BATCH, LENGTH))
            start = time.perf_counter()
            model(tokens, use_cache=False)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32, {BATCH} x {LENGTH}"
    )
    for name, config in CONFIGS.items():
        theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
        ours = copy.deepcopy(theirs)
        use_mixers(ours)
        peer, mine = seconds(theirs), seconds(ours)
        rates = [BATCH * LENGTH / value for value in (peer, mine)]
        print(f"{name}: transformers {rates[0]:.0f} tokens/s, ours {rates[1]:.0f} tokens/s, {peer / mine:.2f}x")


if __name__ == "__main__":
    main()
