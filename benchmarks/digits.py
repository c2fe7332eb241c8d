"""The main job: `reslab train digits`, three seeds, each a whole process from typing to report.

python benchmarks/digits.py            about a minute and a half; asked: mean top-1 >= 98.5 %, under 60 s each
"""

import statistics
import sys

from measure import keep, train

if __name__ == "__main__":
    seeds = [0] if "--smoke" in sys.argv else [0, 1, 2]
    runs = {seed: train("digits", "--seed", str(seed), *(["--epochs", "2"] if "--smoke" in sys.argv else [])) for seed in seeds}
    lines = []
    for seed, run in runs.items():
        test = run.last("test")
        lines.append(f"seed {seed}: test top-1 {test['top1']:.2%} [{test['top1_low']:.2%}, {test['top1_high']:.2%}], n = {test['n']}; {run.seconds:.1f} s")
    mean = statistics.mean(run.last("test")["top1"] for run in runs.values())
    keep(
        "digits",
        [
            "reslab train digits, from process start to report",
            *lines,
            f"mean top-1 {mean:.2%}, slowest {max(r.seconds for r in runs.values()):.1f} s",
        ],
    )
