"""What the benchmarks share: running a command as a whole process, and keeping what was printed."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"


class Measured(NamedTuple):
    """One training as a whole process: wall seconds, peak resident GiB, its records."""

    seconds: float
    peak_gib: float
    records: list[dict[str, Any]]

    def last(self, kind: str) -> dict[str, Any]:
        return next(record for record in reversed(self.records) if record["kind"] == kind)


def train(*arguments: str | Path) -> Measured:
    """`reslab train` with these arguments, from starting Python to its exit."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "reslab", "train", *map(str, arguments), "--out", str(out)])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        if status:
            sys.exit(f"reslab train {' '.join(map(str, arguments))} failed with status {status}")
        assert (out / "report.html").stat().st_size > 10_000
        records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return Measured(seconds, usage.ru_maxrss / 2**20, records)


def train_here(data: str, out: Path, *arguments: str) -> Path:
    """The folder of a run that is kept; for what is measured of a trained net."""
    subprocess.run([sys.executable, "-m", "reslab", "train", data, *arguments, "--out", str(out)], check=True)
    return out


def torchvision_net(name: str) -> Any:
    """In eval mode. Its compiled operators do not load beside a CPU build of torch; the models do not need them, only their schemas."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.models

    net = getattr(torchvision.models, name)(weights=None).eval()
    net.library = library  # kept alive with the net
    return net


def hardware() -> str:
    """The machine and software in one line, as runs record them."""
    from reslab.train.hardware import machine

    with machine() as here:
        facts = here.describe()
    return f"{facts['name']}, {facts['memory_gib']} GiB, {facts['system']}, torch {facts['torch']}, {facts['threads']} threads"


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "no commit"


def keep(name: str, lines: list[str]) -> None:
    """Prints the lines, and writes them to results/ unless this is a smoke run."""
    text = "\n".join([*lines, f"commit {commit()}; {hardware()}"]) + "\n"
    print(text, end="")
    if "--smoke" not in sys.argv:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.txt").write_text(text)
