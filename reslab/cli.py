"""The command `reslab`: one thin function a verb. Exit status 0 for success, 1 when the work failed, 2 for a wrong call."""

import contextlib
import glob
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import field as dataclass_field
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import cyclopts
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reslab import __version__
from reslab.errors import CallError, WorkError, shown
from reslab.train.recipe import RECIPES, Recipe, helps

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from reslab.data.check import Checkup
    from reslab.run import Run

DIGITS = "digits"
app = App(
    name="reslab",
    help="The workbench for residual networks. Try: reslab train digits",
    version=__version__,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
)


def _flags() -> type:
    """A dataclass with one optional field a Recipe field, which cyclopts shows as options."""
    hints = get_type_hints(Recipe)
    rows: list[Any] = []
    for f in fields(Recipe):
        kept = "" if f.default in (None, "") else f" (default {str(f.default).lower() if isinstance(f.default, bool) else f.default})"
        text = helps()[f.name].text + kept
        rows.append((f.name, Annotated[hints[f.name] | None, Parameter(help=text, show_default=False)], dataclass_field(default=None)))
    made = make_dataclass("Flags", rows, frozen=True, kw_only=True)
    made.__module__ = __name__  # cyclopts takes a class of the standard library for a plain value
    return made


Flags = _flags()
JsonFlag = Annotated[bool, Parameter(name="--json", negative="", help="print JSON")]


@app.command
def train(
    data: Annotated[str | None, Parameter(help="digits, cifar10, cifar100, mnist, fashion-mnist, a folder, or a CSV of path,label")] = None,
    /,
    *,
    net: Annotated[str | None, Parameter(help="a name that `reslab models` lists; by default resnet20 up to 64 px, resnet18 above")] = None,
    out: Annotated[Path | None, Parameter(help="the run folder to make; by default below runs/")] = None,
    resume: Annotated[Path | None, Parameter(help="continue the run in this folder")] = None,
    budget: Annotated[str | None, Parameter(help="time for everything, such as 20m: as many epochs as fit")] = None,
    recipe: Annotated[str, Parameter(help=f"{', '.join(RECIPES)}, or a .toml file of recipe fields")] = "quick",
    tensorboard: Annotated[bool, Parameter(negative="", help="also write the curves for TensorBoard (extra `tensorboard`)")] = False,
    flags: Annotated[Flags, Parameter(name="*", group="Recipe")] = Flags(),  # type: ignore[valid-type]  # noqa: B008
) -> int:
    """Train a classifier, test it once, write a run folder with a report."""
    from reslab.job import train as run_training

    given = {name: value for name, value in vars(flags).items() if value is not None}
    with _watch() as show:
        run = run_training(data, net, out, resume=resume, recipe=recipe, budget=budget, tensorboard=tensorboard, show=show, **given)
    if int(os.environ.get("RANK", "0")) == 0:
        _print_result(run)
    return 0


@app.command
def check(
    data: Annotated[str, Parameter(help="as for train")] = DIGITS,
    /,
    *,
    as_json: JsonFlag = False,
) -> int:
    """The data doctor: unreadable files, duplicates, leakage, imbalance. Exit status 1 when there is a problem."""
    from reslab.data.check import check as examine
    from reslab.data.source import open_images

    with _watch() as show:
        images = open_images(data, show.reading)
        found = examine(images, show.reading)
    if as_json:
        print(json.dumps({"data": data, "images": len(images), **found.to_dict()}, indent=1))
    else:
        _print_checkup(shown(images.name), len(images), found)
    return 0 if found.is_healthy else 1


@app.command
def predict(
    run: Annotated[Path, Parameter(help="a run folder, or its model/")],
    /,
    *images: Annotated[str, Parameter(help="files, folders or patterns such as 'photos/*.jpg'")],
    as_json: JsonFlag = False,
) -> int:
    """The likeliest classes of images. Exit status 1 when one could not be read; the others are done."""
    from reslab.use.classifier import Prediction, load

    paths = _expand(images)
    classifier = load(run)
    failed = False
    table = Table("image", "class", "probability", "next")
    for column in table.columns:
        column.overflow = "fold"
    rows: list[dict[str, Any]] = []
    for path, found in classifier.predict_each(paths):
        if isinstance(found, Prediction):
            rows.append({"image": str(path), **found._asdict()})
            then = "  ".join(f"{shown(label)} {p:.1%}" for label, p in found.top[1:3])
            table.add_row(Text(shown(path)), Text(shown(found.label)), f"{found.probability:.1%}", Text(then))
        else:
            failed = True
            rows.append({"image": str(path), "error": found})
            table.add_row(Text(shown(path)), Text(found, style="red"), "", "")
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        _console().print(table)
    return 1 if failed else 0


@app.command
def evaluate(
    run: Annotated[Path, Parameter(help="a run folder")],
    data: Annotated[str | None, Parameter(help="other labelled images; by default the run's own test part")] = None,
    /,
    *,
    as_json: JsonFlag = False,
) -> int:
    """Score a run on its test part again, or on all of other labelled images."""
    from reslab.job import evaluate as evaluate_run

    with _watch() as show:
        scores = evaluate_run(run, data, show.reading)
    if as_json:
        print(json.dumps(scores, indent=1))
    else:
        _print_scores(scores)
    return 0


@app.command
def report(run: Annotated[Path, Parameter(help="a run folder")], /) -> int:
    """Draw report.html anew from a run's records."""
    from reslab.report.page import write_report
    from reslab.run import Run

    print(shown(write_report(Run.open(run))))
    return 0


@app.command
def study(
    name: Annotated[str | None, Parameter(help="a question that `reslab study` lists")] = None,
    /,
    *,
    data: Annotated[str | None, Parameter(help="as for train; by default digits for short budgets and cifar10 from 5m")] = None,
    budget: Annotated[str, Parameter(help="time such as 2m or 10m, or `paper` for the published protocol")] = "10m",
    image_size: Annotated[int | None, Parameter(help="pixels a side; by default half of CIFAR-10's at short budgets, otherwise the images' own")] = None,
    out: Annotated[Path | None, Parameter(help="the study's folder; by default below studies/. An interrupted study goes on there")] = None,
    seeds: Annotated[int, Parameter(help="trainings of each net")] = 3,
    jobs: Annotated[int | None, Parameter(help="processes; by default one a core")] = None,
) -> int:
    """Answer a question about residual networks by measuring. Without a name: the list of questions."""
    from reslab.study import STUDIES

    if name is None:
        table = Table("study", "question")
        for key, question in STUDIES.items():
            table.add_row(key, question)
        _console().print(table)
        return 0
    from reslab.studies import study as run_study

    with _watch() as show:
        page, claims = run_study(name, data, budget, image_size, out, seeds, jobs, show)
    for claim in claims:
        print(f"{claim.verdict}: {claim.paper}\n  {claim.measured}")
    print(f"page: {shown(page)}")
    return 0


@app.command
def models() -> int:
    """The family as a table."""
    from reslab.family import FAMILY

    table = Table("net", "parameters", "multiply-adds", "at", "source")
    for column in table.columns[1:4]:
        column.justify = "right"
    for name, row in FAMILY.items():
        cost = row.spec.cost(row.image_size)
        table.add_row(name, f"{cost.params:,}", f"{cost.macs / 1e6:,.1f} M", f"{row.image_size} px", row.source)
    _console().print(table)
    return 0


@app.command
def show(
    name: Annotated[str, Parameter(help="a name that `reslab models` lists")],
    /,
    *,
    image_size: Annotated[int | None, Parameter(help="pixels a side; by default what the net was published for")] = None,
) -> int:
    """One network, layer by layer: output shape, parameters, multiply-adds and their share."""
    from reslab.family import FAMILY, spec

    net = spec(name)
    size = FAMILY[name].image_size if image_size is None else image_size
    if not 1 <= size <= 4096:
        raise CallError(f"--image-size must be from 1 to 4096; received {size}")
    net.check_size(size)
    cost, layers = net.cost(size), list(net.layers(size))
    largest = max(layer.macs for layer in layers)
    table = Table("layer", "kind", "output", "parameters", "multiply-adds", "share", title=f"{name} at {size} px, {FAMILY[name].source}")
    for column in table.columns[2:5]:
        column.justify = "right"
    for layer in layers:
        bar = f"{'█' * round(16 * layer.macs / largest):16} {layer.macs / cost.macs:.1%}" if layer.macs else ""
        shape = " x ".join(map(str, layer.shape))
        table.add_row(layer.name, layer.kind, shape, f"{layer.params:,}" if layer.params else "", f"{layer.macs:,}" if layer.macs else "", bar)
    _console().print(table)
    print(f"{cost.params:,} parameters, {cost.macs:,} multiply-adds, {cost.activations:,} bytes of activations an image in fp32")
    return 0


def main(tokens: list[str] | None = None) -> None:
    """Runs a command line and exits. An error is one line on stderr; `--debug` adds the traceback."""
    tokens = list(sys.argv[1:] if tokens is None else tokens)
    debug = "--debug" in tokens
    tokens = [word for word in tokens if word != "--debug"]
    try:
        status = app(tokens) if tokens else app(["--help"])
        sys.exit(status if isinstance(status, int) else 0)
    except (SystemExit, BrokenPipeError) as error:
        code = error.code if isinstance(error, SystemExit) else 1
    except KeyboardInterrupt:
        code = _complain("stopped", 130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = _complain(*_explain(error))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)


def _explain(error: Exception) -> tuple[str, int]:
    """The line and the exit status for an error."""
    if isinstance(error, cyclopts.CycloptsError):
        return " ".join(str(error).split()) + " (`reslab --help` shows what there is)", 2
    if isinstance(error, CallError):
        return str(error), 2
    if isinstance(error, WorkError):
        return str(error), 1
    if (number := getattr(error, "signal", None)) is not None:  # Interrupted; its module loads torch
        return f"{error}; continue with --resume", 128 + int(number)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {shown(str(error.filename))}" if error.filename else ""), 1
    return f"unexpected {type(error).__name__}: {shown(str(error))[:300]}; --debug shows where", 1


def _complain(line: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print(f"reslab: {' '.join(line.splitlines())}", file=sys.stderr)
    return status


def _console() -> Console:
    """For tables: on a terminal as wide as it is, otherwise wide enough to cut nothing."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _expand(images: tuple[str, ...]) -> list[Path]:
    """Files as given, the image files of folders, and what patterns match."""
    from reslab.data.folder import image_paths

    found: list[Path] = []
    for given in images:
        path = Path(given).expanduser()
        if path.is_dir():
            found += image_paths(path)
        elif not path.exists() and glob.has_magic(given):
            found += sorted(Path(match) for match in glob.glob(str(path), recursive=True)) or [path]  # noqa: PTH207  # patterns may be absolute
        else:
            found.append(path)
    if not found:
        raise CallError(f"predict needs image files; received {' '.join(map(shown, images)) or 'none'}, which names no image: give files, folders or patterns")
    return found


class _Watcher:
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
            self.progress.console.print(Text(text))
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
def _watch() -> Iterator[_Watcher]:
    console = Console(stderr=False, highlight=False)
    if not console.is_terminal:
        yield _Watcher(None)
        return
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "", style="cyan")

    columns = (TextColumn("{task.description}"), BarColumn(), Rate(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        add = progress.add_task
        progress.add_task = lambda *args, **kwargs: add(*args, text="", **kwargs)  # type: ignore[method-assign]
        yield _Watcher(progress)


def _print_result(run: "Run") -> None:
    test = run.last("test")
    assert test
    _print_scores(test)
    print(f"report: {shown(run.path / 'report.html')}")
    print(f"try: reslab predict {shown(run.path)} IMAGE")


def _print_scores(scores: dict[str, Any]) -> None:
    def line(name: str, key: str, form: Callable[[float], str]) -> str:
        return f"{name} {form(scores[key])} (95 % interval {form(scores[f'{key}_low'])} to {form(scores[f'{key}_high'])})"

    parts = [line("top-1", "top1", "{:.2%}".format)]
    parts += [line("top-5", "top5", "{:.2%}".format)] if "top5" in scores else []
    parts += [line("loss", "loss", "{:.3f}".format), line("calibration error", "ece", "{:.2%}".format)]
    print(f"test, n = {scores['n']:,}: " + "\n  ".join(parts))


def _print_checkup(name: str, n: int, found: "Checkup") -> None:
    console = _console()
    parts = sorted({part for row in found.counts.values() for part in row})
    table = Table("class", *parts, title=f"{name}: {n:,} images, {len(found.counts)} classes")
    for label, row in list(found.counts.items())[:100]:
        table.add_row(Text(shown(label)), *(str(row[part]) for part in parts))
    console.print(table)
    console.print("  ".join(f"{axis} {low} / {mid} / {high} px" for axis, (low, mid, high) in found.sizes.items()) + " (smallest / median / largest)")
    for finding in found.findings:
        console.print(Text("problem  " if finding.is_problem else "note     ", style="red" if finding.is_problem else "yellow") + Text(finding.text))
    console.print("healthy" if found.is_healthy else "not healthy: the problems above make results untrustworthy")


if __name__ == "__main__":
    main()
