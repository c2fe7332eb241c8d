"""What `reslab.train` refuses, keeps back and records; the steps themselves are tested in train/."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import reslab
from reslab import job
from reslab.cli import _explain
from reslab.data.source import open_images
from reslab.errors import CallError
from reslab.nets.torch import ResNet
from reslab.train.fit import Training
from reslab.train.hardware import Machine
from reslab.train.pieces import RunningStatistics
from reslab.train.plan import Plan
from reslab.train.recipe import Recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": "1h", "epochs": 3}, r"received --budget 1h and --epochs 3: leave one out"),
        ({"budget": 60, "steps": 30}, r"received --budget 60 and --steps 30: leave one out"),
        ({"memory": "4G", "compile": "always"}, r"received --memory and --compile always: leave one out"),
    ],
)
def test_options_of_which_one_would_be_ignored_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CallError, match=message):
        reslab.train("digits", out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_images_are_not_drawn_anywhere_from_shards_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "open_images", lambda data, reading: replace(open_images(data), source="https://example.org/shards.json"))
    with pytest.raises(CallError, match="received --balance sampling, which draws images anywhere: use --balance weights"):
        reslab.train("digits", out=tmp_path / "run", balance="sampling")


@pytest.mark.parametrize(("keep", "epoch"), [("best", 1), ("last", 3)])
def test_the_epoch_recorded_is_that_of_the_weights_kept(keep: str, epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(Training, "evaluate", lambda self: {"loss": 1.0, "n": 9, "top1": next(val)})
    net = reslab.spec("resnet20", depths=(1,), widths=(8,))
    run = reslab.train("digits", net, tmp_path / "run", epochs=3, batch_size=512, keep=keep)
    assert (run.last("calibration") or {})["epoch"] == epoch


@pytest.mark.parametrize("world", [1, 4])
def test_what_follows_a_training_takes_as_long_however_many_processes_shared_val(world: int) -> None:
    part = SimpleNamespace(items=range(100))
    job_of = SimpleNamespace(parts={"val": part, "test": part}, recipe=Recipe(), machine=Machine(CPU, world=world))
    plan = Plan(10, 10, "fp32", "", val_seconds=8.0 / world)
    assert job._reserve(job_of, plan) == job._reserve(SimpleNamespace(**{**vars(job_of), "machine": Machine(CPU)}), replace(plan, val_seconds=8.0))  # type: ignore[arg-type]
    assert job._reserve(job_of, plan) > 2 * 2 * 8.0  # type: ignore[arg-type]


def test_processes_of_a_net_without_batch_norm_have_no_statistics_to_share() -> None:
    """What NCCL could not do: there is no vector of them on the GPU."""

    class Lonely(Machine):
        def total(self, values: torch.Tensor) -> torch.Tensor:
            raise AssertionError("there is nothing to sum")

    statistics = RunningStatistics(ResNet(reslab.spec("resnet20", norm="group")))
    before = statistics.read()
    statistics.write_mean(before, 2, Lonely(CPU, world=2))
    assert before.numel() == statistics.read().numel() == 0


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("you tried: can't allocate memory")])
def test_memory_that_ran_out_is_told_with_what_helps(error: Exception) -> None:
    line, status = _explain(error)
    assert (line[:24], status) == ("the memory must suffice;", 1)
