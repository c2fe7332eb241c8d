"""Runs a study: prepares its images, plans its cells within the budget, and works them off in processes.

OUT/plan.json holds the plan, so that an interrupted study goes on with the same cells; OUT/cells/KEY.jsonl the records of
each finished cell, written whole. A cell whose records are there is not done again.
"""

import importlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from reslab.data.source import Progress, silent
from reslab.errors import CallError, WorkError, shown, unknown
from reslab.host import keep_freed_memory
from reslab.nets.torch import ResNet
from reslab.run import Record, write_whole
from reslab.spec import Spec
from reslab.study import STUDIES
from reslab.study.data import Data, Facts, load, prepare
from reslab.study.kinds import Cell, Schedule, Setting, Study

TIMED_STEPS = 3
Tell = Callable[[str], None]


def find(name: str) -> Study:
    """The study of that name. Raises CallError with the nearest one."""
    if name not in STUDIES:
        raise unknown("study", name, STUDIES, "; `reslab study` lists them")
    study: Study = importlib.import_module(f"reslab.study.{name}").STUDY
    return study


def run(name: str, source: str, size: int | None, setting: Setting, out: Path, tell: Tell = print, progress: Progress = silent) -> tuple[list[Record], Facts]:
    """All records of a study, those of finished cells from before included, and what is known of the images. Raises CallError when no cell fits the budget."""
    study, started = find(name), time.monotonic()
    data = prepare(source, size, out / "data", progress)
    cells = _plan(study, name, data, setting, out)
    waiting = [cell for cell in cells if not _file(out, cell, name, data).is_file()]
    tell(f"{name}: {len(cells)} cells on {data.facts.name} at {data.facts.size} px, {len(cells) - len(waiting)} done before")
    for done, cell in enumerate(_work(name, out, waiting, setting.jobs), start=len(cells) - len(waiting) + 1):
        tell(f"{done}/{len(cells)}  {cell.name}  {time.monotonic() - started:.0f} s")
    return [record for cell in cells for record in read(_file(out, cell, name, data))], data.facts


def _plan(study: Study, name: str, data: Data, setting: Setting, out: Path) -> list[Cell]:
    """The cells, from plan.json where it answers the same call: measured paces differ from run to run."""
    file = out / "plan.json"
    asked = {"study": name, "fingerprint": data.facts.fingerprint, "size": data.facts.size, **setting._asdict()}
    try:
        held = json.loads(file.read_text("utf-8"))
        if held["asked"] == asked:
            return [_cell(row) for row in held["cells"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or one of another call
    cells = study.cells(setting, data, _Pace(data))
    if any(cell.schedule and cell.schedule.steps < 1 for cell in cells):
        raise CallError(f"the budget must allow every cell a step; {setting.seconds:.0f} s do not for {len(cells)} cells: raise --budget or lower --seeds")
    write_whole(file, json.dumps({"asked": asked, "cells": [asdict(cell) for cell in cells]}).encode())
    return cells


def _cell(row: dict[str, Any]) -> Cell:
    schedule = row["schedule"] and Schedule(**{**row["schedule"], "milestones": tuple(row["schedule"]["milestones"])})
    return Cell(row["name"], Spec.from_dict(row["spec"]), row["seed"], schedule, row["facts"])


class _Pace:
    """Times a few training steps of a net in this process, with the threads that a cell will have."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __call__(self, spec: Spec, batch: int) -> float:
        net = ResNet(spec).train()
        x = torch.randn(batch, spec.in_channels, self.data.facts.size, self.data.facts.size).contiguous(memory_format=torch.channels_last)
        times = []
        for _ in range(TIMED_STEPS):
            start = time.perf_counter()
            net(x).logsumexp(1).sum().backward()
            times.append(time.perf_counter() - start)
        return min(times[1:])


def _work(name: str, out: Path, cells: list[Cell], jobs: int) -> Iterator[Cell]:
    """Yields each cell when its records are on the disk. What is finished stays, whatever happens to the rest."""
    if not cells:
        return
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(cells)), context, _begin, (threads,)) as pool:
        running: dict[Future[None], Cell] = {pool.submit(work_off, name, out, cell): cell for cell in cells}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    cell = running.pop(future)
                    future.result()
                    yield cell
        except BrokenProcessPool as error:
            raise WorkError("a process of the study was killed, perhaps for want of memory; the finished cells are kept: repeat the command") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()


def work_off(name: str, out: Path, cell: Cell) -> None:
    """Measures one cell and writes its records whole."""
    data = load(out / "data")
    rows = [{**record, "cell": cell.name, "seed": cell.seed, **cell.facts} for record in find(name).measure(cell, data)]
    lines = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
    write_whole(_file(out, cell, name, data), lines.encode())


def _file(out: Path, cell: Cell, name: str, data: Data) -> Path:
    return out / "cells" / f"{cell.key(name, data.facts.fingerprint)}.jsonl"


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
