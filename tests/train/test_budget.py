"""A training within a time, by a clock that only its steps and its val move. benchmarks/cifar_budget.py has a real one."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import reslab
from reslab import job
from reslab.job import Silent
from reslab.run import Run
from reslab.train import fit, plan
from reslab.train.fit import Training

BUDGET, STEP, VAL = 70.0, 1.0, 0.5  # seconds; the last two as planned


class Ended(Exception):
    """What follows a training is not waited for."""


class Clock(Silent):
    """Goes on by what was planned for a step, times `pace`; holds the rate of the last step."""

    def __init__(self, pace: float) -> None:
        self.pace, self.now, self.rate = pace, 0.0, 0.0

    def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
        self.now += self.pace * STEP
        self.rate = facts["lr"]

    def say(self, text: str) -> None:
        if text == "testing":
            raise Ended


@pytest.mark.parametrize("pace", [1.0, 2.0, 0.5])
def test_a_budget_is_used_up_and_kept_however_fast_the_steps_turn_out(pace: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, evaluate, deadlines = Clock(pace), Training.evaluate, set()

    def timed(self: Training) -> dict[str, float]:
        clock.now += VAL
        deadlines.add(self.deadline)
        return evaluate(self)

    for module in (job, fit):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(job, "weighing_seconds", lambda *what: 5.0)  # where processors differ
    monkeypatch.setattr(Training, "evaluate", timed)
    monkeypatch.setattr(plan, "_time_step", lambda *step: STEP)
    monkeypatch.setattr(plan, "_time", lambda work, x: VAL / 179 * len(x))
    net = reslab.spec("resnet20", widths=(4,), depths=(1,))
    with pytest.raises(Ended):
        reslab.train("digits", net, tmp_path / "run", budget=BUDGET, batch_size=128, precision="fp32", compile="never", show=clock)
    [deadline], run = deadlines, Run(tmp_path / "run")
    assert 0 < deadline < BUDGET - job.REPORT_SECONDS
    assert deadline - VAL - pace * STEP < clock.now < deadline + VAL
    replanned, recipe = list(run.records("replan")), run.config["recipe"]
    steps = replanned[-1]["steps"]
    assert clock.rate == pytest.approx(recipe["lr"] / (1 - recipe["warmup"]) / steps), "a step before the end of the schedule"
    assert [record["pace"] for record in replanned] == pytest.approx([pace] * len(replanned))
    assert len(list(run.records("epoch"))) == len(replanned) + 1 > 2
    assert run.last("epoch")["step"] == steps


def test_a_budget_without_time_for_an_epoch_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(reslab.CallError, match="the budget must allow one epoch"):
        reslab.train("digits", out=tmp_path / "run", budget=1)
    assert not (tmp_path / "run").exists()
