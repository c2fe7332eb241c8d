"""A study from the call to its page: which images, which nets, which budget; the records, the verdicts, the page."""

import hashlib
import platform
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from reslab import __version__
from reslab.cluster import Pool
from reslab.data.images import Images
from reslab.data.named import roots
from reslab.data.preprocess import Preprocess
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.errors import CallError, WorkError, shown
from reslab.family import spec as find_spec
from reslab.host import cores
from reslab.limits import seconds
from reslab.report.study import write_study
from reslab.run import Run, shipped
from reslab.study import STUDIES
from reslab.study.data import Facts, prepare
from reslab.study.kinds import Claim, Given, Setting, Study
from reslab.study.lab import Outcome, Place, Workers, find, keep, processes, run
from reslab.use.artefact import TorchModel
from reslab.use.classifier import Classifier, load
from reslab.use.own import own_images

SHORT = 300.0  # seconds; a budget below it is for digits
LONG = 3600.0  # seconds; below it images are made smaller
SMALL = {"cifar10": 16, "cifar100": 16}  # pixels a side in a budget below LONG; otherwise
MOST_PIXELS = 64
SPLIT_SEED = 0
MOST_SEEDS = 100
STUDIES_FOLDER = Path("studies")


class Show(Protocol):
    """What a study tells while it runs."""

    def say(self, text: str) -> None: ...
    def reading(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Call:
    """What `reslab study` was asked, as typed."""

    data: str | None = None
    runs: tuple[Path, ...] = ()
    net: str | None = None
    budget: str = "10m"
    image_size: int | None = None
    out: Path | None = None
    seeds: int = 3
    jobs: int | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        jobs, size = 1 if self.jobs is None else self.jobs, 32 if self.image_size is None else self.image_size
        if not 1 <= self.seeds <= MOST_SEEDS or not 1 <= jobs <= 1024 or not 4 <= size <= 1024:
            raise CallError(
                f"--seeds must be 1 to {MOST_SEEDS}, --jobs 1 to 1024, --image-size 4 to 1024; received {self.seeds}, {self.jobs}, {self.image_size}"
            )
        if self.runs and (self.data or self.net or self.image_size):
            raise CallError("a study of trained runs looks at the data they were trained on; received a run and --data, --net or --image-size: leave them out")

    @property
    def seconds(self) -> float:
        """The budget; 0 for the published protocol."""
        return 0.0 if self.budget == "paper" else float(seconds(self.budget) or 0)


def study(name: str, call: Call, show: Show) -> tuple[Path, list[Claim]]:
    """Measures what is missing and writes OUT/study.html; returns its path and the claims.

    Raises CallError for an unknown study, a run where none belongs, a budget that is no time or too short, and WorkError
    for work that failed.
    """
    found = find(name)
    if call.runs and not found.shipped:
        raise CallError(f"study {name} makes its own nets; received the run {shown(call.runs[0])}: leave it out")
    call = _with_defaults(call, found)
    out = _folder(name, call)
    with _workers(call) as (call, workers):
        return _answered(name, found, call, Place(out, call.out or STUDIES_FOLDER, out), show, workers)


def study_all(call: Call, show: Show) -> list[tuple[str, Path, list[Claim]]]:
    """Every study in turn, each with the whole budget, in OUT/NAME; they share prepared images and trained nets.

    One that fails does not stop the others. Raises WorkError at the end for those that did.
    """
    if call.runs:
        raise CallError(f"`study all` asks more than trained runs can answer; received the run {shown(call.runs[0])}: name one study, or leave it out")
    answered, failed = [], []
    with _workers(call) as (call, workers):
        for name in STUDIES:
            each = replace(call, out=call.out and call.out / name)
            try:
                found = find(name)
                each = _with_defaults(each, found)
                out = _folder(name, each)
                answered.append((name, *_answered(name, found, each, Place(out, call.out or STUDIES_FOLDER, out), show, workers)))
            except (CallError, WorkError) as error:
                show.say(f"{name}: {error}")
                failed.append(name)
    if failed:
        raise WorkError(f"{len(answered)} studies are answered; {', '.join(failed)} failed for the reasons above")
    return answered


def _folder(name: str, call: Call) -> Path:
    """Where a study goes, once it is known what it looks at: another place for another net or size, or for other images of the same name."""
    paths = [path.resolve() if path.exists() else path for path in call.runs or (Path(str(call.data)),)]
    subject = "-".join(path.name if call.runs else path.stem for path in paths)
    is_ours = not any(path.exists() for path in paths)  # a named data set, a net that comes with reslab
    mark = None if is_ours else hashlib.sha256("\n".join(map(str, paths)).encode("utf-8", "surrogateescape")).hexdigest()[:6]
    size = f"{call.image_size}px" if call.image_size else None
    return call.out or STUDIES_FOLDER / "-".join(part for part in (name, subject, mark, call.net, size, call.budget) if part)


@contextmanager
def _workers(call: Call) -> Iterator[tuple[Call, Workers]]:
    """Who works off the cells, processes of this machine or the cores of a cluster, and the call with how many they are."""
    if call.cluster is None:
        yield replace(call, jobs=min(call.jobs or cores(), cores())), processes  # more of them would only compete
        return
    address = call.cluster
    with Pool(address) as held:  # one connection, which those below use
        yield replace(call, jobs=call.jobs or held.cores), lambda jobs, begin: Pool(address, begin)


def _with_defaults(call: Call, found: Study) -> Call:
    """The call with what it leaves open: shipped nets for a study of trained ones, else digits or CIFAR-10."""
    short = 0 < call.seconds < SHORT
    if call.runs or call.data:
        return call
    if found.shipped and not (call.net or call.image_size or short) and _has_cifar() and set(found.shipped) <= set(shipped()):
        return replace(call, runs=tuple(Path(name) for name in found.shipped))
    return replace(call, data="digits" if short or not _has_cifar() else "cifar10")


def _answered(name: str, found: Study, call: Call, place: Place, show: Show, workers: Workers) -> tuple[Path, list[Claim]]:
    assert call.jobs
    if call.cluster:
        place = Place(*(path.absolute() for path in place))
    if call.runs:
        given = [(path, load(path)) for path in call.runs]
        images, size, preprocess = _of_runs(call.runs, [c for _, c in given], show)
    else:
        assert call.data
        images = split(open_images(call.data, show.reading), SPLIT_SEED)
        size, preprocess, given = call.image_size or _size(images, call), None, []
    data, folder = prepare(images, size, place.store, preprocess)
    base = call.net or ("resnet20" if size <= MOST_PIXELS else "resnet18")
    shape = {"in_channels": data.facts.channels, "num_classes": data.facts.classes}
    nets = tuple(Given(_named(path, call.runs), c.spec, keep(c.net, place.store)) for path, c in given)
    setting = Setting(call.seconds, call.jobs, call.seeds, find_spec(base, **shape), nets)
    page, began = _page(name, found, call, data.facts, setting), time.monotonic()
    lost = data.facts.left_out
    left_out = f" {lost:,} image{'s' * (lost > 1)} that cannot be read {'are' if lost > 1 else 'is'} left out." if lost else ""

    def draw(outcome: Outcome, running: bool) -> tuple[Path, list[Claim]]:
        claims = found.claims(outcome.records)
        protocol = _protocol(setting, outcome, images.image_size, size, running) + left_out
        measured = {"answer": found.answer(outcome.records), "claims": claims, "protocol": protocol}
        now = {"seconds": round(time.monotonic() - began), "cells": outcome.done, "running": running}
        return write_study(place.out / "study.html", page | measured | now, outcome.records), claims

    outcome = run(name, place._replace(data=folder), setting, show.say, draw if found.live else None, workers)
    return draw(outcome, running=False)


def _page(name: str, found: Study, call: Call, facts: Facts, setting: Setting) -> dict[str, Any]:
    """What the page says that is known before anything is measured."""
    where = "a Ray cluster" if call.cluster else f"{cores()} cores"
    return {
        "name": name,
        "study": found,
        "data": facts.name,
        "size": facts.size,
        "command": _command(name, call, facts.size),
        "version": __version__,
        "hardware": f"{platform.machine()}, {setting.jobs} processes on {where}, torch {torch.__version__}",
    }


def _named(path: Path, among: tuple[Path, ...]) -> str:
    """A run's name: its folder's, unless another run's folder is called the same."""
    names = [other.resolve().name for other in among]
    return shown(path.resolve().name if names.count(path.resolve().name) == 1 else path)


def _of_runs(paths: tuple[Path, ...], classifiers: list[Classifier], show: Show) -> tuple[Images, int, Preprocess]:
    """The images that the runs were trained on. Raises CallError unless all saw the same ones in the same way, WorkError when they are gone."""
    for path, classifier in zip(paths, classifiers, strict=True):
        if not classifier.has_net:
            raise CallError(f"a study looks at the blocks of a net, and an exported file has only its graph; received {shown(path)}: give the run folder")
    first = classifiers[0].model
    assert isinstance(first, TorchModel)
    prints = {hashlib.sha256(repr(c.preprocess.to_dict() if isinstance(c.preprocess, Preprocess) else None).encode()).hexdigest() for c in classifiers}
    images = [own_images(Run.open(path), show.reading) for path in paths]
    if len(prints) > 1 or len({i.fingerprint() for i in images}) > 1:
        raise CallError("runs can be compared when they saw the same images in the same way; these differ in data or preprocessing: study them one by one")
    return images[0], first.preprocess.image_size, first.preprocess


def _size(images: Images, call: Call) -> int:
    """Pixels a side: the images' own, or fewer for a budget below an hour."""
    own = images.image_size
    if not 0 < call.seconds < LONG:
        return own
    return min(own, SMALL.get(str(call.data), MOST_PIXELS))


def _protocol(setting: Setting, outcome: Outcome, own: int, size: int, running: bool) -> str:
    steps = max((int(r["steps"]) for r in outcome.records if "steps" in r), default=0)
    trained = f", which gave every net {steps:,} steps" if steps else ""
    kind = "The published protocol" if setting.is_paper else f"A budget of {setting.seconds / 60:g} min{trained}"
    seeds = f", {outcome.seeds} seed{'s' * (outcome.seeds > 1)}" if outcome.seeds else ""
    small = f"; the images are {size} pixels a side, where their own size is {own}" if size < own and not setting.given else ""
    short = " What needs longer trainings cannot be decided here." if outcome.trains and not setting.is_paper else ""
    of = f"{outcome.done} of {outcome.planned} cells"
    missing = f" It is still running: {of} so far." if running else f" Only {of} are measured: the same command does the rest."
    missing = "" if outcome.done == outcome.planned else missing
    return f"{kind}{seeds}{small}.{short}{missing}"


def _command(name: str, call: Call, size: int) -> str:
    what = [str(path) for path in call.runs] if call.runs else ["--data", str(call.data), "--image-size", str(size)]
    net = ["--net", call.net] if call.net else []
    out = ["--out", str(call.out)] if call.out else []
    how = ["--budget", call.budget, "--seeds", str(call.seeds), "--jobs", str(call.jobs), *(["--cluster", call.cluster] if call.cluster else [])]
    return shown(shlex.join(["reslab", "study", name, *what, *net, *out, *how]))


def _has_cifar() -> bool:
    return any((root / "cifar-10-batches-py" / "batches.meta").is_file() for root in roots())
