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
from reslab.data.batches import Batch, Batches
from reslab.data.images import Images
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.errors import CallError
from reslab.job import Silent
from reslab.nets.torch import ResNet
from reslab.run import Run
from reslab.train.fit import Training
from reslab.train.hardware import Machine
from reslab.train.pieces import RunningStatistics, pieces
from reslab.train.plan import Plan
from reslab.train.recipe import Recipe
from reslab.use.own import own_images
from tests.conftest import draw

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": "1h", "epochs": 3}, r"received --budget 1h and --epochs 3: leave one out"),
        ({"budget": 60, "steps": 30}, r"received --budget 60 and --steps 30: leave one out"),
        ({"memory": "4G", "compile": "always"}, r"received --memory and --compile always: leave one out"),
        ({"net": "resnet110_relu_before_add", "zero_init": True}, "a branch that begins at zero behind a ReLU never gets a gradient"),
    ],
)
def test_options_of_which_one_would_be_ignored_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CallError, match=message):
        reslab.train("digits", out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_processes_that_see_other_images_do_not_train(folder: Path) -> None:
    told: list[Any] = []
    writer = SimpleNamespace(world=2, agree=lambda value: told.append(value) or value)
    other = SimpleNamespace(world=2, agree=lambda value: told[0])
    job._check_alike(split(open_images(folder), 0), writer)  # type: ignore[arg-type]
    job._check_alike(split(open_images(folder), 0), other)  # type: ignore[arg-type]
    first = min(folder.rglob("*.png"))
    first.rename(first.with_name("zzz.png"))
    with pytest.raises(reslab.WorkError, match=r"all processes must see the same images; .* has others than the first one's"):
        job._check_alike(split(open_images(folder), 0), other)  # type: ignore[arg-type]


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


def photos(root: Path) -> Path:
    for c, name in enumerate(("red", "green")):
        for i in range(12):
            draw(root / name / f"{i}.png", (200 - 150 * c, 50 + 150 * c, 60), i)
    return root


def test_a_class_of_which_nothing_can_be_trained_on_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_and_break(data: Any, reading: Any) -> Images:
        images = open_images(data)
        for file in Path(data).glob("green/*"):
            file.write_bytes(b"gone bad")
        return images

    monkeypatch.setattr(job, "open_images", open_and_break)
    with pytest.raises(reslab.WorkError, match="each class needs a readable image to train on; 'green' has none"):
        reslab.train(photos(tmp_path / "p"), out=tmp_path / "run", batch_size=4, balance="weights")


def test_a_run_resumes_with_its_pixels_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(Silent):
        def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
            if step == 2:
                raise KeyboardInterrupt

    used: set[str] = set()

    def noted(images: Images, items: Any, size: int, storage: Any, workers: int) -> Batches:
        used.add(storage)
        return Batches(images, items, size, storage, workers)

    monkeypatch.setattr(job, "choose_storage", lambda *_: ("stream", "because"))
    net = reslab.spec("resnet20", depths=(1,), widths=(8,))
    with pytest.raises(KeyboardInterrupt):
        reslab.train(photos(tmp_path / "p"), net, tmp_path / "run", steps=6, batch_size=4, save_every=0, show=Cut())
    monkeypatch.setattr(job, "choose_storage", lambda *_: ("memory", "of more of it"))
    monkeypatch.setattr(job, "Batches", noted)
    reslab.train(resume=tmp_path / "run")
    assert used == {"stream"}


@pytest.fixture
def cut_short(tmp_path: Path) -> Run:
    """A run on a declared split that was ended at its second step; its images lie in ../p."""

    class Cut(Silent):
        def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
            if step == 2:
                raise KeyboardInterrupt

    for number, part in enumerate(("train", "val", "test")):
        for c, name in enumerate(("red", "green")):
            for i in range(4):
                draw(tmp_path / "p" / part / name / f"{i}.png", (200 - 150 * c, 50 + 150 * c, 60), 10 * number + i)
    with pytest.raises(KeyboardInterrupt):
        reslab.train(tmp_path / "p", reslab.spec("resnet20", depths=(1,), widths=(8,)), tmp_path / "run", steps=6, batch_size=4, save_every=0, show=Cut())
    return Run(tmp_path / "run")


def test_a_run_does_not_resume_on_its_images_in_another_order(cut_short: Run) -> None:
    red = cut_short.path.parent / "p" / "train" / "red"
    (red / "0.png").rename(red / "9.png")
    assert len(own_images(cut_short)) == 24, "where the order says nothing they are the same"
    with pytest.raises(reslab.WorkError, match="has its images in another order now: restore it, or train into a new --out"):
        reslab.train(resume=cut_short.path)
    (red / "9.png").rename(red / "0.png")
    assert (reslab.train(resume=cut_short.path).model / "spec.json").is_file()


def test_a_run_whose_classes_have_other_numbers_now_is_refused(cut_short: Run) -> None:
    config = cut_short.config
    cut_short.config = {**config, "data": {**config["data"], "classes": config["data"]["classes"][::-1]}}
    with pytest.raises(reslab.WorkError, match="has its classes in another order now: restore it, or train into a new --out"):
        reslab.train(resume=cut_short.path)
    with pytest.raises(reslab.WorkError, match=r"has its classes in another order now: restore it$"):
        own_images(cut_short)


def test_a_batch_of_which_images_are_missing_is_cut_evenly() -> None:
    batch = Batch(torch.zeros(49, 4, 4, 3), torch.zeros(49), torch.arange(49))
    assert [len(part.items) for part in pieces(batch, 4)] == [13, 12, 12, 12]
    assert [len(part.items) for part in pieces(Batch(*(part[:2] for part in batch)), 4)] == [1, 1]
