"""A study from the call to its page: which images, which budget, the records, the verdicts, the page."""

import os
import platform
from pathlib import Path
from typing import Protocol

import torch

from reslab import __version__
from reslab.data.named import roots
from reslab.errors import CallError, shown
from reslab.limits import seconds
from reslab.report.study import write_study
from reslab.study.kinds import Claim, Setting
from reslab.study.lab import find, run

SHORT = 300.0  # seconds; a budget below it is for digits
HALF_BELOW = 3600.0  # CIFAR-10 at half its resolution below that budget
MOST_SEEDS = 100


class Show(Protocol):
    """What a study tells while it runs."""

    def say(self, text: str) -> None: ...
    def reading(self, what: str, done: int, total: int) -> None: ...


def study(
    name: str, data: str | None, budget: str, image_size: int | None, out: Path | None, seeds: int, jobs: int | None, show: Show
) -> tuple[Path, list[Claim]]:  # fmt: skip
    """Measures what is missing and writes OUT/study.html; returns its path and the claims.

    Raises CallError for an unknown study, a budget that is no time or too short, and WorkError for work that failed.
    """
    found = find(name)
    if not 1 <= seeds <= MOST_SEEDS or not 1 <= (jobs or 1) <= 1024 or not 4 <= (image_size or 32) <= 1024:
        raise CallError(f"--seeds must be 1 to {MOST_SEEDS}, --jobs 1 to 1024, --image-size 4 to 1024; received {seeds}, {jobs}, {image_size}")
    time = 0.0 if budget == "paper" else float(seconds(budget) or 0)
    source = data or ("digits" if 0 < time < SHORT or not _has_cifar() else "cifar10")
    size = image_size or (16 if source == "cifar10" and 0 < time < HALF_BELOW else None)
    setting = Setting(time, jobs or len(os.sched_getaffinity(0)), seeds)
    target = out or Path("studies") / f"{name}-{Path(source).stem}-{budget}"
    records, facts = run(name, source, size, setting, target, show.say, show.reading)
    claims = found.claims(records)
    page = {
        "name": name,
        "study": found,
        "claims": claims,
        "data": facts.name,
        "size": facts.size,
        "protocol": _protocol(setting, records, facts.size, source),
        "command": f"reslab study {name} --data {shown(source)} --budget {budget} --image-size {facts.size} --seeds {seeds} --jobs {setting.jobs}",
        "cells": len({r["cell"] for r in records}),
        "version": __version__,
        "hardware": f"{platform.machine()}, {setting.jobs} processes on {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}",
    }
    return write_study(target / "study.html", page, records), claims


def _protocol(setting: Setting, records: list[dict[str, object]], size: int, source: str) -> str:
    steps = max((int(str(r["steps"])) for r in records if "steps" in r), default=0)
    kind = "The published protocol" if setting.is_paper else f"A budget of {setting.seconds / 60:g} minutes, which gave every net {steps:,} steps"
    small = "; the images are at half their resolution" if source == "cifar10" and size == 16 else ""
    return f"{kind}, {setting.seeds} seeds{small}. What needs longer trainings cannot be decided here."


def _has_cifar() -> bool:
    return any((root / "cifar-10-batches-py" / "batches.meta").is_file() for root in roots())
