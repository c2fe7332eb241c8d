"""Runs a study: plans its cells within the budget and works them off in processes, here or on a cluster, trainings first.

OUT/plan.json holds what the plan was made from, so that an interrupted study goes on with the same cells; OUT/cells/KEY.jsonl the records of
each finished cell. STORE holds what studies share: decoded images, and the trained nets as STORE/nets/KEY.safetensors.
Everything is written whole and named by content, and what is there is not done again.
"""

import contextlib
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from reslab.errors import CallError, WorkError, shown, unknown
from reslab.host import cores, keep_freed_memory
from reslab.nets.torch import ResNet
from reslab.run import Record, write_whole
from reslab.spec import Spec
from reslab.study import STUDIES
from reslab.study.data import Data, load
from reslab.study.kinds import Cell, Ready, Setting, Study, Subject
from reslab.study.training import train
from reslab.tensors import read_tensors, write_tensors

TIMED_STEPS = 3
REDRAWN = 0.04  # of the time, at most, goes into drawing what is there so far
Tell = Callable[[str], None]
Workers = Callable[[int, Callable[[], None]], AbstractContextManager[Executor]]  # so many at a time; each calls that before it works


class Place(NamedTuple):
    """Where a study keeps its records, what it shares with others, and the prepared images."""

    out: Path
    store: Path
    data: Path

    def cell(self, name: str, cell: Cell, fingerprint: str) -> Path:
        return self.out / "cells" / f"{cell.key(name, fingerprint)}.jsonl"

    def net(self, key: str) -> Path:
        return self.store / "nets" / f"{key}.safetensors"


class Outcome(NamedTuple):
    """All records of a study, those of cells finished earlier included, and how many of its cells that are.

    `seeds` is from how many seeds nets were made for these; a given net has none. `trains`: some of the planned cells train theirs.
    """

    records: list[Record]
    done: int
    planned: int
    seeds: int
    trains: bool


def find(name: str) -> Study:
    """The study of that name. Raises CallError with the nearest one."""
    if name not in STUDIES:
        raise unknown("study", name, STUDIES, "; `reslab study` lists them")
    study: Study = importlib.import_module(f"reslab.study.{name}").STUDY
    return study


@contextlib.contextmanager
def processes(jobs: int, begin: Callable[[], None]) -> Iterator[Executor]:
    """Processes of this machine, which do not outlive this one. What is broken off, by Ctrl-C or a signal, does not wait for what they are at."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), partial(_in_process, begin)) as pool:
        try:
            yield pool
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


def _in_process(begin: Callable[[], None]) -> None:
    """Ctrl-C reaches the whole process group; only the parent answers it, and ends its processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the parent ends it, also where the parent's own caller ignores it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def run(
    name: str, place: Place, setting: Setting, tell: Tell = print, draw: Callable[[Outcome, bool], object] | None = None, workers: Workers = processes
) -> Outcome:
    """Measures what is missing. Cells for which the budget has no time left stay undone: repeating the call does them.

    `draw` is given what is there, now and then while the rest is measured, and whether it still is: a study that breaks off
    is drawn once more. `workers` are all to see `place`. Raises CallError when the budget allows no step, WorkError when the
    work fails; finished cells are kept.
    """
    data, started = load(place.data), time.monotonic()
    cells = _plan(find(name), name, data, setting, place)
    fingerprint = data.facts.fingerprint
    waiting = [cell for cell in cells if not place.cell(name, cell, fingerprint).is_file()]
    tell(f"{name}: {len(cells)} cells on {data.facts.name} at {data.facts.size} px, {len(cells) - len(waiting)} done before")
    done, due = len(cells) - len(waiting), 0.0
    try:
        for cell, seconds in _work(name, place, waiting, fingerprint, setting, started, workers):
            done += 1
            tell(f"{done}/{len(cells)}  {cell.name}  {seconds:.0f} s")
            if draw and seconds > due:
                draw(_outcome(name, place, cells, fingerprint), True)
                due = seconds + (time.monotonic() - started - seconds) / REDRAWN
    except BaseException:  # Ctrl-C too
        if draw and done:
            draw(_outcome(name, place, cells, fingerprint), False)
        raise
    return _outcome(name, place, cells, fingerprint)


def _outcome(name: str, place: Place, cells: list[Cell], fingerprint: str) -> Outcome:
    done = [(cell.subject, file) for cell in cells if (file := place.cell(name, cell, fingerprint)).is_file()]
    records = [record for _, file in done for record in read(file)]
    seeds = {subject.seed for subject, _ in done if not subject.weights}
    return Outcome(records, len(done), len(cells), len(seeds), any(cell.training or cell.subject.schedule for cell in cells))


def _plan(study: Study, name: str, data: Data, setting: Setting, place: Place) -> list[Cell]:
    """The cells. Paces differ from run to run, so plan-HASH.json keeps those that a call was planned by.

    When it is repeated, or asked for other seeds, the same schedules come out, and what is finished stays.
    """
    asked = {"study": name, "fingerprint": data.facts.fingerprint, **setting._asdict(), "net": asdict(setting.net)}
    seeds = asked.pop("seeds")
    asked = json.loads(json.dumps(asked, default=asdict))
    file = place.out / f"plan-{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]}.json"
    paces: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none
        held = json.loads(file.read_text("utf-8"))
        if held["asked"] == asked:
            seeds, paces = int(held["seeds"]), {str(key): float(pace) for key, pace in held["paces"].items()}
    pace = _Pace(data, _threads(setting.jobs), paces)
    cells = study.cells(setting._replace(sharing=seeds), data, pace)
    schedules = [s for cell in cells for s in (cell.training, cell.subject.schedule) if s]
    if not cells or any(schedule.steps < 1 for schedule in schedules):
        raise CallError(f"the budget must allow every cell a step; {setting.seconds:.0f} s do not for {len(cells)} cells: raise --budget or lower --seeds")
    write_whole(file, json.dumps({"asked": asked, "seeds": seeds, "paces": pace.known}).encode())
    return cells


class _Pace:
    """Times a few training steps of a net with a cell's threads; this process keeps its own, and its random numbers.

    What is `known` is not timed again.
    """

    def __init__(self, data: Data, threads: int, known: dict[str, float]) -> None:
        self.size, self.threads, self.known = data.facts.size, threads, known

    def __call__(self, spec: Spec, batch: int) -> float:
        key = hashlib.sha256(json.dumps([asdict(spec), batch]).encode()).hexdigest()[:24]
        if key not in self.known:
            self.known[key] = self._with_threads(spec, batch)
        return self.known[key]

    def _with_threads(self, spec: Spec, batch: int) -> float:
        own = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self._timed(spec, batch)
        finally:
            torch.set_num_threads(own)

    def _timed(self, spec: Spec, batch: int) -> float:
        with torch.random.fork_rng():
            net = ResNet(spec).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
            x = torch.randn(batch, spec.in_channels, self.size, self.size).contiguous(memory_format=torch.channels_last)
            times = []
            for _ in range(TIMED_STEPS):
                start = time.perf_counter()
                net(x).logsumexp(1).sum().backward()
                times.append(time.perf_counter() - start)
        return min(times[1:])


class _Queue:
    """What may be begun: cells whose net is there first, then the trainings that cells wait for."""

    def __init__(self, cells: list[Cell], place: Place, fingerprint: str) -> None:
        self.ready: deque[Cell] = deque()
        self.untrained: dict[str, list[Cell]] = {}  # by the key of the subject, in the order of the plan
        for cell in cells:
            key = cell.subject.key(fingerprint)
            if cell.subject.schedule and not place.net(key).is_file():
                self.untrained.setdefault(key, []).append(cell)
            else:
                self.ready.append(cell)

    def next(self) -> Cell | list[Cell] | None:
        """A cell to measure, or the cells whose common subject is to be trained."""
        if self.ready:
            return self.ready.popleft()
        return self.untrained.pop(next(iter(self.untrained))) if self.untrained else None


def _work(name: str, place: Place, cells: list[Cell], fingerprint: str, setting: Setting, started: float, workers: Workers) -> Iterator[tuple[Cell, float]]:
    """Yields each cell when its records are on the disk, and the seconds since the beginning. What is finished stays, whatever happens to the rest.

    Once a cell is finished, nothing is begun that would, going by the longest of its kind so far, end after the budget.
    """
    if not cells:
        return
    queue, longest, end = _Queue(cells, place, fingerprint), {train_one: 0.0, work_off: 0.0}, setting.seconds or math.inf
    with workers(min(setting.jobs, len(cells)), partial(_begin, _threads(setting.jobs))) as pool:
        running: dict[Future[None], tuple[Cell | list[Cell], float]] = {}
        any_done = False
        try:
            while True:
                while len(running) < setting.jobs and (item := queue.next()) is not None:
                    now = time.monotonic() - started
                    function = train_one if isinstance(item, list) else work_off
                    if any_done and now + longest[function] > end:
                        break
                    task = (train_one, place, item[0].subject) if isinstance(item, list) else (work_off, name, place, item)
                    running[pool.submit(*task)] = item, now
                if not running:
                    return
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                now = time.monotonic() - started
                for future in finished:
                    item, began = running.pop(future)
                    _finished(future, item)
                    function = train_one if isinstance(item, list) else work_off
                    longest[function] = max(longest[function], now - began)
                    if isinstance(item, list):
                        queue.ready += item
                    else:
                        any_done = True
                        yield item, now
        except BrokenProcessPool as error:
            raise WorkError("a process of the study was killed, perhaps for want of memory; the finished cells are kept: repeat the command") from error


def _finished(future: Future[None], item: Cell | list[Cell]) -> None:
    """Raises WorkError for what went wrong where it was worked off, or whatever says more."""
    try:
        future.result()
    except (CallError, WorkError, BrokenProcessPool):
        raise
    except Exception as error:
        which = f"the training for {item[0].name}" if isinstance(item, list) else item.name
        line = shown(str(error).splitlines()[0][:120]) if str(error) else ""
        raise WorkError(f"{which} failed: {type(error).__name__} {line}; the finished cells are kept: repeat the command") from error


def _threads(jobs: int) -> int:
    """Threads for each of so many processes."""
    return max(1, cores() // jobs)


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()


def initial(subject: Subject) -> ResNet:
    """The net as its seed initialises it; the caller's random numbers stay as they are."""
    with torch.random.fork_rng():
        torch.manual_seed(subject.seed)
        return ResNet(subject.spec).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def train_one(place: Place, subject: Subject) -> None:
    """Trains a subject and leaves it in the store with its losses."""
    assert subject.schedule
    data = load(place.data)
    target = place.net(subject.key(data.facts.fingerprint))
    net, state, start = initial(subject), target.with_suffix(".state"), time.process_time()
    losses = train(net, data, subject.schedule, subject.seed, state=state)
    held: dict[str, Any] = {"losses": _finite(losses), "seconds": round(time.process_time() - start, 1), **asdict(subject)}
    write_tensors(target, net.state_dict(), json.dumps(held))
    state.unlink(missing_ok=True)


def ready(subject: Subject, place: Place, fingerprint: str) -> Ready:
    """The net of a subject: initialised here, or read from the store."""
    net = initial(subject)
    if not subject.schedule and not subject.weights:
        return Ready(net, [])
    file = place.net(subject.key(fingerprint))
    weights, header = read_tensors(file)
    try:
        net.load_state_dict(weights)
        held = json.loads(header).get("losses", []) if header else []
        return Ready(net, [math.nan if loss is None else loss for loss in held])
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise WorkError(f"{shown(file)} is damaged: delete it, and the net is trained again") from error


def work_off(name: str, place: Place, cell: Cell) -> None:
    """Measures one cell and writes its records whole."""
    data = load(place.data)
    found = find(name).measure(cell, ready(cell.subject, place, data.facts.fingerprint), data)
    rows = [{**record, "cell": cell.name, "seed": cell.subject.seed, **cell.facts} for record in found]
    lines = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
    write_whole(place.cell(name, cell, data.facts.fingerprint), lines.encode())


def keep(net: nn.Module, store: Path) -> str:
    """Puts given weights into the store, and gives back their key."""
    digest = hashlib.sha256()
    for key, tensor in sorted(net.state_dict().items()):
        digest.update(key.encode() + b"\0" + tensor.detach().cpu().contiguous().numpy().tobytes())
    name = digest.hexdigest()[:24]
    if not (target := Place(store, store, store).net(name)).is_file():
        write_tensors(target, net.state_dict())
    return name


def read(file: Path) -> list[Record]:
    """The records of a finished cell."""
    try:
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise WorkError(f"{shown(file)} is damaged: delete it, and the cell is measured again") from error


def _finite(value: Any) -> Any:
    """JSON has no infinity: what is not finite becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
