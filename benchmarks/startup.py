"""What the bridge to lm-eval adds to every start of Python: median over fresh interpreters, in microseconds.

    python benchmarks/startup.py

Each interpreter times the line that an install puts into `lm_eval_mamba.pth`.
"""

import statistics
import subprocess
import sys
from pathlib import Path

RUNS = 100
CODE = "import time; start = time.perf_counter(); {line}; print(time.perf_counter() - start)"

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "buildtools"))


def main() -> None:
    from pth_backend import pth_line

    command = [sys.executable, "-I", "-S", "-c", CODE.format(line=pth_line().strip())]
    times = [float(subprocess.run(command, capture_output=True, check=True).stdout) * 1e6 for _ in range(RUNS)]
    low, *_, high = statistics.quantiles(times, n=20)
    print(f"bridge: median {statistics.median(times):.0f} µs of {RUNS} starts, 5% to 95% {low:.0f} to {high:.0f} µs")


if __name__ == "__main__":
    main()
