"""What the benchmarks share: running a command as a whole process, and keeping what was printed."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
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
        return train_in(out, *arguments, "--out", out)


def train_in(out: Path, *arguments: str | Path) -> Measured:
    """As `train`; the run is in `out` and stays there."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "reslab", "train", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        sys.exit(f"reslab train {' '.join(map(str, arguments))} failed with status {status}")
    assert (out / "report.html").stat().st_size > 10_000
    return Measured(seconds, usage.ru_maxrss / 2**20, records(out))


def records(out: Path) -> list[dict[str, Any]]:
    """Those of a run."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class Enough(Exception):
    """The steps that were to be timed are done."""


class Steps:
    """A Show that notes the loss and the time at the end of every step, and stops the training after `count`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.times: list[float] = []
        self.losses: list[float] = []
        self.said: list[str] = []
        self.sums = 0.0  # of the losses of this epoch; what is shown is their mean

    def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
        self.times.append(time.perf_counter())
        before = self.sums if step > 1 else 0.0
        self.sums = facts["loss"] * step
        self.losses.append(self.sums - before)
        if len(self.times) >= self.count:
            raise Enough

    def epoch(self, epoch: int, epochs: int, facts: dict[str, float]) -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)

    def reading(self, what: str, done: int, total: int) -> None: ...


def our_steps(count: int, data: str | Path, **given: Any) -> Steps:
    """The first `count` steps of `reslab.train`, as a person would start it: reading, plan and loop are the product's."""
    import reslab

    steps = Steps(count)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        reslab.train(data, out=Path(folder) / "run", show=steps, **given)
    return steps


def some_of_cifar(root: Path, count: int) -> Path:
    """The first images of CIFAR-10 as files, so that a whole run of a deep net takes minutes."""
    from PIL import Image

    from reslab.data.source import open_images

    images = open_images("cifar10")
    assert images.array is not None
    for i in range(count):
        folder = root / images.classes[images.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.array[i]).save(folder / f"{i}.png")
    return root


def in_turns(rounds: int, jobs: dict[str, list[str]]) -> dict[str, list[dict[str, Any]]]:
    """Every round runs each command once, as a process of its own; what it prints last is a JSON object, and these come back."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, command in jobs.items():
            done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def prepared_in_turns(rounds: int, jobs: dict[str, list[str]]) -> dict[str, list[dict[str, Any]]]:
    """As `in_turns`, for commands that take long to get ready: each is one process that does a round when it is told to.

    They get ready one after the other. Such a process calls `turn` before its first round and with what it found after each.
    """
    processes: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    try:
        for name, command in jobs.items():
            processes[name] = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            _told(processes[name])
        for _ in range(rounds):
            for name, process in processes.items():
                assert process.stdin
                process.stdin.write("go\n")
                process.stdin.flush()
                found[name].append(_told(process))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return found


def _told(process: "subprocess.Popen[str]") -> Any:
    """The next line that is an answer of `turn`."""
    assert process.stdout
    for line in process.stdout:
        if line.startswith("turn "):
            return json.loads(line[5:])
    sys.exit(f"{' '.join(map(str, process.args))} ended before its turn")  # type: ignore[arg-type]


def turn(found: dict[str, Any] | None = None) -> None:
    """In a process of `prepared_in_turns`: says what a round found, and waits for the next."""
    print("turn", json.dumps(found), flush=True)
    sys.stdin.readline()


def on_the_cpu() -> None:
    """Hides GPUs from this process and those it starts: ours would take them, the peer would not."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def ratio(a: Sequence[float], b: Sequence[float]) -> str:
    """The median of a / b, round by round, and its range."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"median ratio {statistics.median(ratios):.2f}x, {min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)}"


def oracle(module: str) -> Any:
    """torchvision, or a part of it. Its compiled operators do not load beside a CPU build of torch; their schemas are enough."""
    import importlib

    import torch

    if torch.version.cuda is None:
        _schemas()
    return importlib.import_module(module)


@cache
def _schemas() -> Any:
    """Operators of torchvision, by name only; kept, since they go with the library."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def train_here(data: str, out: Path, *arguments: str) -> Path:
    """The folder of a run that is kept; for what is measured of a trained net."""
    subprocess.run([sys.executable, "-m", "reslab", "train", data, *arguments, "--out", str(out)], check=True)
    return out


def torchvision_net(name: str) -> Any:
    """One of torchvision's nets with random weights, in eval mode."""
    return getattr(oracle("torchvision.models"), name)(weights=None).eval()


def hardware() -> str:
    """The machine and software in one line, as runs record them."""
    from reslab.train.hardware import machine

    with machine() as here:
        facts = here.describe()
    return f"{facts['name']}, {facts['memory_gib']} GiB, {facts['system']}, torch {facts['torch']}, {facts['threads']} threads"


def commit() -> str:
    """Of the working tree, "-dirty" when more than kept results differs from it; a copy without one is told in COMMIT what it was made of."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    with contextlib.suppress(OSError):
        if found := git("rev-parse", "--short", "HEAD"):
            return found + "-dirty" * bool(git("status", "--porcelain", "--untracked-files=no", ":/", ":!results"))
    return os.environ.get("COMMIT", "no commit")


def keep(name: str, lines: list[str]) -> None:
    """Prints the lines, and writes them to results/ unless this is a smoke run."""
    text = "\n".join([*lines, f"commit {commit()}; {hardware()}"]) + "\n"
    print(text, end="")
    if "--smoke" not in sys.argv:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.txt").write_text(text)
