"""How studies train a net, step by step, and how they count its errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reslab.study import training
from reslab.study.data import Data
from reslab.study.kinds import Schedule
from reslab.study.training import augmented, errors, image_order, train


class Linear(nn.Module):
    """Logits of 8x8 images by a matrix and a factor; remembers a random number of every step."""

    def __init__(self, scale: float = 0.01) -> None:
        super().__init__()
        self.matrix = nn.Parameter(scale * torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))
        self.factor = nn.Parameter(torch.ones(1))
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(torch.rand(1).item())
        return self.factor * (x.flatten(1) @ self.matrix)


class Three(nn.Module):
    """Takes every image for a 3."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training, "errors are those of eval mode"
        return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()


def test_errors_are_shares_of_wrong_answers(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SCORED", 100)
    some = data.train_labels[::13]
    assert len(some) <= 100
    assert errors(Three().train(), data) == {  # type: ignore[arg-type]
        "train_error": (some != 3).mean(), "train_n": len(some), "test_error": (data.test_labels != 3).mean(), "test_n": 359,
    }  # fmt: skip


def test_a_step_is_sgd_with_decay_and_a_rate_of_its_own_for_single_numbers(data: Data) -> None:
    net, n = Linear(), len(data.train)
    before = [p.detach().clone() for p in (net.matrix, net.factor)]
    x, y = data.train_batch(np.arange(n))
    gradients = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), (net.matrix, net.factor))
    train(net, data, Schedule(1, 10**6, lr=0.1, weight_decay=0.5, warmup=0.0, augment=False, scalars=0.1), seed=0)  # type: ignore[arg-type]
    for p, was, gradient, lr in zip((net.matrix, net.factor), before, gradients, (0.1, 0.01), strict=True):
        torch.testing.assert_close(p.detach(), was - lr * (gradient + 0.5 * was), rtol=1e-4, atol=1e-6)


def test_random_layers_draw_anew_at_every_step(data: Data) -> None:
    net = Linear()
    train(net, data, Schedule(5, 32), seed=0)  # type: ignore[arg-type]
    assert len(set(net.drawn)) == 5


def test_a_loss_beyond_hope_ends_the_training(data: Data) -> None:
    net = Linear(1e5)
    before = net.matrix.detach().clone()
    losses = train(net, data, Schedule(9, 32), seed=0)  # type: ignore[arg-type]
    assert len(losses) == 2
    assert 1e4 < losses[0] < float("inf") and np.isnan(losses[1])
    assert torch.equal(net.matrix, before)


def test_every_epoch_has_an_order_of_its_own() -> None:
    steps = image_order(100, Schedule(4, 50), 0)
    first, second = np.concatenate(steps[:2]), np.concatenate(steps[2:])
    assert sorted(first) == sorted(second) == list(range(100))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("upright", [True, False])
def test_images_are_shifted_by_an_eighth_and_mirrored_where_that_is_no_other_class(upright: bool, data: Data) -> None:
    data, items = replace(data, facts=replace(data.facts, upright=upright)), np.arange(0, 1200, 10)
    shown, later = (augmented(data, items, Schedule(9), 0, step, torch.device("cpu"))[0] for step in (0, 1))
    assert not torch.equal(shown, later)
    mirrored = []
    for image, seen in zip(data.train_batch(items)[0], shown, strict=True):
        ways = {flip: nn.functional.pad(image.flip(2) if flip else image, (1, 1, 1, 1)) for flip in (False, True)}
        found = [flip for flip, wide in ways.items() if any(torch.equal(seen, wide[:, r : r + 8, c : c + 8]) for r in range(3) for c in range(3))]
        assert found, "shifted by more than an eighth of 8 pixels"
        mirrored.append(found[0])
    assert any(mirrored) != upright
