"""What the command shows on a terminal: progress, tables, results. rich is loaded where it is used."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from reslab.errors import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from reslab.data.check import Checkup
    from reslab.run import Run

LISTED = 100  # classes of a checkup


def width() -> int | None:
    """Columns of the terminal; None where there is none, and nothing is cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def prepare_streams() -> None:
    """What is printed goes nowhere where the caller has closed the stream, and what its encoding does not have is escaped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115  # to the end of the process
        with contextlib.suppress(AttributeError):  # a notebook's own stream
            getattr(sys, name).reconfigure(errors="backslashreplace")


def console() -> "Console":
    """For tables: on a terminal as wide as it is, otherwise wide enough to cut nothing."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


class Watcher:
    """Shows a training on a terminal: a bar with the rate, time left, loss and top-1. Elsewhere only what `say` says."""

    def __init__(self, progress: "Progress | None") -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
        if self.progress:
            text = f"loss {facts['loss']:.3f}  top-1 {facts['top1']:6.1%}  epoch {epoch}/{epochs}"
            self._show("training", (epoch - 1) * steps + step, epochs * steps, text)

    def epoch(self, epoch: int, epochs: int, facts: dict[str, float]) -> None:
        if self.progress:
            self.progress.console.print(
                f"epoch {epoch:3d}/{epochs}  loss {facts['loss']:.3f}  train top-1 {facts['top1']:6.1%}  val top-1 {facts['val_top1']:6.1%}"
            )

    def say(self, text: str) -> None:
        if self.progress:
            self.progress.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def reading(self, what: str, done: int, total: int) -> None:
        if self.progress:
            self._show(what, done, total, "")
            if done >= total:
                self.progress.remove_task(self.tasks.pop(what))

    def _show(self, what: str, done: int, total: int, text: str) -> None:
        assert self.progress
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done, total=total, text=text)


@contextlib.contextmanager
def watch() -> Iterator[Watcher]:
    """A progress display while the block runs, where there is a terminal."""
    if not sys.stdout.isatty():  # rich takes a pipe for a terminal under FORCE_COLOR
        yield Watcher(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "", style="cyan")

    columns = (TextColumn("{task.description}"), BarColumn(), Rate(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(highlight=False), transient=True) as progress:
        add = progress.add_task
        progress.add_task = lambda *args, **kwargs: add(*args, text="", **kwargs)  # type: ignore[method-assign]
        yield Watcher(progress)


def print_result(run: "Run") -> None:
    """What a finished training found, and what to do next."""
    test = run.last("test")
    assert test
    print_scores(test)
    print(f"report: {shown(run.path / 'report.html')}")
    print(f"try: reslab predict {shown(run.path)} IMAGE")


def print_scores(scores: dict[str, Any]) -> None:
    """The figures of a test, each with its interval."""

    def line(name: str, key: str, form: Callable[[float], str]) -> str:
        return f"{name} {form(scores[key])} (95 % interval {form(scores[f'{key}_low'])} to {form(scores[f'{key}_high'])})"

    parts = [line("top-1", "top1", "{:.2%}".format)]
    parts += [line("top-5", "top5", "{:.2%}".format)] if "top5" in scores else []
    parts += [line("loss", "loss", "{:.3f}".format), line("calibration error", "ece", "{:.2%}".format)]
    how = "" if scores.get("precision", "fp32") == "fp32" else f" in {scores['precision']}, as it was trained"
    print(f"test{how}, n = {scores['n']:,}: " + "\n  ".join(parts))
    if left_out := scores.get("left_out"):
        print(f"{left_out:,} of the images cannot be read and were left out, first {scores['first_left_out']}")
    if learned := scores.get("learned"):
        print(f"{learned:,} of these images are those it was trained on or chosen by: this says little about others")
    if why := scores.get("not_recorded"):
        print(f"not recorded: {why}")


def print_checkup(name: str, n: int, found: "Checkup") -> None:
    """What the data doctor found: a table of the classes, then the findings."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    parts = sorted({part for row in found.counts.values() for part in row})
    out.print(Text(f"{name}: {n:,} images, {len(found.counts)} classes"))
    table = Table("class", *parts)
    for label, row in list(found.counts.items())[:LISTED]:
        table.add_row(Text(shown(label)), *(str(row[part]) for part in parts))
    out.print(table)
    if len(found.counts) > LISTED:
        out.print(f"and {len(found.counts) - LISTED:,} classes more: --json lists all")
    out.print("  ".join(f"{axis} {low} / {mid} / {high} px" for axis, (low, mid, high) in found.sizes.items()) + " (smallest / median / largest)")
    for finding in found.findings:
        out.print(Text("problem  " if finding.is_problem else "note     ", style="red" if finding.is_problem else "yellow") + Text(finding.text))
    out.print("healthy" if found.is_healthy else "not healthy: the problems above make results untrustworthy")
