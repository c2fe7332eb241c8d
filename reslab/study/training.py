"""The training of a cell: the published protocol, shortened, the same for every twin, each step seeded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reslab.data import augment
from reslab.run import Record
from reslab.study.data import Data
from reslab.study.kinds import Schedule
from reslab.train.fit import seed_of, seeded

ORDER, AUGMENT, LAYERS = 11, 12, 13  # streams of random numbers
SCORED = 5000  # images, at most, that the training error is measured on
BLOW_UP = 1e4  # a loss above it does not come back

Watch = Callable[[int, float], None]


def train(net: nn.Module, data: Data, schedule: Schedule, seed: int, watch: Watch | None = None) -> list[float]:
    """Trains in place and gives back the loss of every step; it ends early, with a NaN, when the loss is lost.

    `watch(step, loss)` is called when the gradients of a step are there and the weights have not moved yet.
    """
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(net.parameters(), schedule.lr, schedule.momentum, weight_decay=schedule.weight_decay)
    losses: list[float] = []
    net.train()
    for step, items in enumerate(_order(len(data.train), schedule, seed)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(schedule, step)
        x, y = _augmented(data, items, schedule, seed, step, device)
        torch.manual_seed(seed_of(seed, LAYERS, step))
        loss = cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        if watch:
            watch(step, losses[-1])
        if not losses[-1] < BLOW_UP:
            return [*losses, float("nan")]
        optimizer.step()
    return losses


def lr_at(schedule: Schedule, step: int) -> float:
    """The learning rate of a step: a linear start, then a tenth of it after each milestone."""
    warm = max(1, round(schedule.warmup * schedule.steps))
    drops = sum(step >= milestone * schedule.steps for milestone in schedule.milestones)
    return schedule.lr * min(1.0, (step + 1) / warm) * 0.1**drops


def errors(net: nn.Module, data: Data) -> Record:
    """Training error (on evenly spaced images, not augmented) and test error in eval mode, each with its n."""
    every = max(1, -(-len(data.train) // SCORED))
    train_wrong, train_n = _wrong(net, data, data.train[::every], data.train_labels[::every])
    test_wrong, test_n = _wrong(net, data, data.test, data.test_labels)
    return {"train_error": train_wrong / train_n, "train_n": train_n, "test_error": test_wrong / test_n, "test_n": test_n}


@torch.no_grad()
def _wrong(net: nn.Module, data: Data, pixels: NDArray[Any], labels: NDArray[Any]) -> tuple[int, int]:
    device, wrong = next(net.parameters()).device, 0
    net.eval()
    for start in range(0, len(pixels), 500):
        found = net(data.normalised(pixels[start : start + 500], device)).argmax(1).cpu().numpy()
        wrong += int((found != labels[start : start + 500]).sum())
    return wrong, len(pixels)


def _order(n: int, schedule: Schedule, seed: int) -> list[NDArray[np.int64]]:
    """The images of each step: every epoch is a permutation of its own, its incomplete last batch left out."""
    batch = min(schedule.batch_size, n)
    each = n // batch
    epochs = (np.random.default_rng([seed, ORDER, epoch]).permutation(n) for epoch in range(-(-schedule.steps // each)))
    return [order[i * batch : (i + 1) * batch] for order in epochs for i in range(each)][: schedule.steps]


def _augmented(data: Data, items: NDArray[np.int64], schedule: Schedule, seed: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    items = np.sort(items)  # a mapped file is read in one direction; the order within a batch changes nothing
    x, y = data.batch(items, device), torch.from_numpy(data.train_labels[items]).to(device)
    if schedule.augment:
        generator = seeded(seed, AUGMENT, step)
        if pad := data.facts.size // 8:
            x = augment.pad_crop(x, pad, generator)
        if not data.facts.upright:
            x = augment.flip(x, torch.rand(len(x), generator=generator) < 0.5)
    return x.contiguous(memory_format=torch.channels_last), y
