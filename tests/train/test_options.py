"""What the options of a recipe do to a training: a tiny net on images that a rule made, without the job around them."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import reslab
from reslab.data.batches import Batches
from reslab.data.images import Images
from reslab.data.preprocess import Preprocess
from reslab.job import Silent
from reslab.nets.torch import ResNet
from reslab.run import Run
from reslab.train import fit
from reslab.train.fit import Training
from reslab.train.hardware import machine
from reslab.train.plan import Plan
from reslab.train.recipe import Recipe, resolve

COUNTS = (40, 20, 4)  # training images of each class; val has 8 of each


def images() -> Images:
    """Noise around a grey that tells the class."""
    labels = np.concatenate([np.repeat(np.arange(3), COUNTS), np.repeat(np.arange(3), 8)])
    noise = np.random.default_rng(0).integers(0, 60, (len(labels), 8, 8, 1))
    pixels = (noise + 60 * labels[:, None, None, None]).astype(np.uint8)
    names = [str(i) for i in range(len(labels))]
    return Images(
        name="greys", classes=("dark", "grey", "light"), labels=labels, names=names, digests=names, sizes=np.full((len(labels), 2), 8, np.int32),
        channels=1, declared=[""] * len(labels), array=pixels,
    )  # fmt: skip


def training(path: Path, show: Silent | None = None, **fields: Any) -> Training:
    """On 64 images, by plain gradient descent at a constant rate unless the fields say otherwise."""
    given = {"batch_size": 32, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "schedule": "step", "milestones": (), "lr": 0.05}
    recipe = resolve(Recipe(**{**given, "low_resolution": 0.0, "crop": "none", "flip": "none", **fields}), sum(COUNTS), 8, upright=False)  # type: ignore[arg-type]
    assert recipe.epochs and recipe.batch_size
    held, per_epoch, run = images(), sum(COUNTS) // recipe.batch_size, Run(path)
    train, val = (Batches(held, np.arange(*span), 8, "memory") for span in ((0, sum(COUNTS)), (sum(COUNTS), len(held))))
    run.create()
    torch.manual_seed(0)
    net = ResNet(reslab.spec("resnet20", widths=(4,), depths=(1,), in_channels=1, num_classes=3))
    preprocess = Preprocess(8, 8, 1, np.full(1, 0.5, np.float32), np.full(1, 0.25, np.float32))
    plan = Plan(recipe.steps or recipe.epochs * per_epoch, per_epoch, "fp32", "as asked")
    with machine() as here:
        return Training(net, train, val, preprocess, recipe, plan, run, here, show or Silent())


def parameters(net: ResNet) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def state(net: ResNet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Watched(Silent):
    """Holds the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
        self.rates.append(facts["lr"])


def with_history(made: Training, top1: Iterable[float]) -> list[dict[str, Tensor]]:
    """Lets val give these top-1 one after the other. The list fills with the weights that were judged."""
    judged: list[dict[str, Tensor]] = []
    history = iter(top1)

    def evaluate() -> dict[str, float]:
        judged.append(state(made.net))
        return {"loss": 1.0, "top1": next(history), "n": 24}

    made.evaluate = evaluate  # type: ignore[method-assign]
    return judged


def test_a_clipped_gradient_is_no_longer_than_asked(tmp_path: Path) -> None:
    lengths = []
    for clip in (0.0, 0.01):
        made = training(tmp_path / str(clip), steps=1, lr=1.0, clip=clip)
        before = parameters(made.net)
        made.run_to_end()
        lengths.append(float((parameters(made.net) - before).norm()))
    assert lengths[0] > 0.02
    assert lengths[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("keep", "kept"), [("best", 2), ("last", 3)])
def test_the_weights_of_the_best_epoch_are_kept_and_of_equals_the_later(tmp_path: Path, keep: str, kept: int) -> None:
    made = training(tmp_path / "run", epochs=4, keep=keep)
    judged = with_history(made, (0.5, 0.75, 0.75, 0.25))
    made.run_to_end()
    assert not same(judged[1], judged[2])
    assert same(state(made.net), judged[kept])
    assert made.progress.best_epoch == 3


def test_what_is_kept_scores_on_val_as_its_best_epoch_did(tmp_path: Path) -> None:
    class Breaks(Silent):
        """Spoils the weights at the end of the second epoch of three."""

        def epoch(self, epoch: int, epochs: int, facts: dict[str, float]) -> None:
            if epoch == 2:
                with torch.no_grad():
                    made.net.fc.weight.zero_()
                    made.net.fc.bias.copy_(torch.tensor([0.0, 0.0, 50.0]))

    made = training(tmp_path / "run", Breaks(), epochs=20)
    made.run_to_end()
    top1 = [record["top1"] for record in made.run.records("val")]
    assert top1[-1] == pytest.approx(1 / 3), "all of them light"
    assert max(top1) > 0.5
    assert made.evaluate()["top1"] == max(top1)


def test_the_first_epochs_may_see_smaller_images(tmp_path: Path) -> None:
    made = training(tmp_path / "run", epochs=5, low_resolution=0.4, low_size=0.5)
    work, seen = made.work, []
    made.work = lambda x, targets: (seen.append(tuple(x.shape[2:])), work(x, targets))[1]  # type: ignore[func-returns-value]
    made.run_to_end()
    assert [record["image_size"] for record in made.run.records("epoch")] == [4, 4, 8, 8, 8]
    assert seen == [(4, 4)] * 4 + [(8, 8)] * 6


def test_rare_classes_weigh_more_in_the_loss_and_all_as_much_together(tmp_path: Path) -> None:
    weights = training(tmp_path / "run", epochs=1, balance="weights").work.weights  # type: ignore[attr-defined]
    assert weights.tolist() == pytest.approx([64 / 3 / count for count in COUNTS])
    assert training(tmp_path / "even", epochs=1).work.weights is None  # type: ignore[attr-defined]


def test_val_is_asked_of_the_average_and_training_goes_on_from_the_weights(tmp_path: Path) -> None:
    made = training(tmp_path / "run", epochs=1, ema=0.9)
    [batch] = made.val.epoch(24)
    x = made.preprocess(batch.pixels, torch.device("cpu"))
    torch.manual_seed(1)
    other = ResNet(made.net.spec).eval()
    made.average.tensors = state(other)  # type: ignore[union-attr]
    before = state(made.net)
    found = made.evaluate()
    assert same(state(made.net), before)
    losses = [cross_entropy(net.eval()(x), batch.labels).item() for net in (other, made.net)]
    assert found["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert found["loss"] != pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_average_is_what_is_kept(tmp_path: Path, keep: str) -> None:
    made = training(tmp_path / "run", epochs=2, ema=0.9, keep=keep)
    with_history(made, (0.5, 0.75))
    made.run_to_end()
    assert made.average
    assert same(state(made.net), made.average.tensors)


def test_what_has_begun_is_not_taken_back_when_a_budget_gives_more_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the full size, nor the lower rate, nor the gradient taken uphill, though each is a share of all steps."""
    show = Watched()
    made = training(tmp_path / "run", show, epochs=10, milestones=(0.5,), low_resolution=0.55, low_size=0.5, sam=0.1, sam_from=0.6)
    made.plan, made.deadline = replace(made.plan, step_seconds=1.0, low_step_seconds=1.0), math.inf
    monkeypatch.setattr(Plan, "steps_within", lambda self, *rest: 26 if made.progress.step >= 12 else 20)
    sizes: list[int] = []
    climbs: list[int] = []
    size, climb = made._size, made._climb
    monkeypatch.setattr(made, "_size", lambda step: sizes.append(size(step)) or sizes[-1] if step == made.progress.step else size(step))
    monkeypatch.setattr(made, "_climb", lambda batch: climbs.append(made.progress.step) or climb(batch))
    made.run_to_end()
    assert made.progress.steps == 26
    assert {round(rate, 6) for rate in show.rates} == {0.05, 0.005}
    assert show.rates == sorted(show.rates, reverse=True)
    assert sizes == sorted(sizes)
    assert set(sizes) == {4, 8}
    assert climbs == list(range(climbs[0], made.progress.steps))


def test_the_rate_falls_to_a_tenth_after_ten_epochs_without_a_better_one(tmp_path: Path) -> None:
    show = Watched()
    made = training(tmp_path / "run", show, epochs=34, schedule="plateau", lr=0.1, batch_size=64)
    with_history(made, [0.25, 0.5, *[0.5] * 20, 0.75, *[0.25] * 11])
    made.run_to_end()
    assert fit.PLATEAU == 10
    assert show.rates == pytest.approx([0.1] * 12 + [0.01] * 10 + [0.001] * 11 + [0.0001])


def test_the_average_counts_the_steps_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = training(tmp_path / "run", epochs=3, ema=0.9)
    assert made.average
    steps, update = [], made.average.update
    monkeypatch.setattr(made.average, "update", lambda net, step: steps.append(step) or update(net, step))
    made.run_to_end()
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_rate_that_was_lowered_stays_so_when_there_is_time_for_more_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = Watched()
    made = training(tmp_path / "run", show, epochs=10, milestones=(0.5,))
    made.plan, made.deadline = replace(made.plan, step_seconds=1.0), math.inf
    monkeypatch.setattr(Plan, "steps_within", lambda self, *rest: 40 if made.progress.step >= 12 else 20)
    made.run_to_end()
    assert made.progress.steps > 20
    assert show.rates == sorted(show.rates, reverse=True)
