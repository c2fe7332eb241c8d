"""The training of a net: the published protocol, shortened, the same for every twin, each step seeded."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reslab.data import augment
from reslab.errors import WorkError
from reslab.run import Record
from reslab.seeds import seed_of, seeded
from reslab.study.data import Data
from reslab.study.kinds import Ready, Schedule
from reslab.tensors import below, read_tensors, write_tensors

ORDER, AUGMENT, LAYERS = 11, 12, 13  # streams of random numbers
SCORED = 5000  # images, at most, that the training error is measured on
BLOW_UP = 1e4  # a loss above it does not come back
POINTS = 80  # of a curve
SAVE_SECONDS = 60.0  # between two resume points

Watch = Callable[[int, float], None]


def train(net: nn.Module, data: Data, schedule: Schedule, seed: int, watch: Watch | None = None, state: Path | None = None) -> list[float]:
    """Trains in place and gives back the loss of every step; it ends early, with a NaN, when the loss is lost.

    `watch(step, loss)` is called when the gradients of a step are there and the weights have not moved yet. At `state` a
    resume point is kept; a training that finds one goes on from there, bit for bit.
    """
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(_groups(net, schedule), schedule.lr, schedule.momentum, weight_decay=schedule.weight_decay)
    losses = _resume(state, net, optimizer) if state else []
    saved = time.monotonic()
    net.train()
    order = image_order(len(data.train), schedule, seed)
    for step in range(len(losses), len(order)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(schedule, step) * group["share"]
        x, y = augmented(data, order[step], schedule, seed, step, device)
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
        if state and time.monotonic() - saved > SAVE_SECONDS:
            _save(state, net, optimizer, losses)
            saved = time.monotonic()
    return losses


def _groups(net: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    scalars = [p for p in net.parameters() if p.numel() == 1]
    return [{"params": [p for p in net.parameters() if p.numel() > 1], "share": 1.0}, {"params": scalars, "share": schedule.scalars}]


def lr_at(schedule: Schedule, step: int) -> float:
    """The learning rate of a step: a linear start, then a tenth of it after each milestone."""
    warm = max(1, round(schedule.warmup * schedule.steps))
    drops = sum(step >= milestone * schedule.steps for milestone in schedule.milestones)
    return schedule.lr * min(1.0, (step + 1) / warm) * 0.1**drops


def outcome(ready: Ready, data: Data) -> list[Record]:
    """Two records of a training: its running loss (`curve`), and its errors (`result`)."""
    losses = ready.losses
    every = max(1, len(losses) // POINTS)
    smooth = [sum(losses[i : i + every]) / len(losses[i : i + every]) for i in range(0, len(losses), every)]
    curve: Record = {"kind": "curve", "every": every, "loss": [round(value, 5) if value < 1e9 else None for value in smooth]}
    parameters = sum(p.numel() for p in ready.net.parameters())
    lost = bool(losses) and not np.isfinite(losses[-1])
    return [curve, {"kind": "result", "steps": len(losses) - lost, "lost": lost, "parameters": parameters, **errors(ready.net, data)}]


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


def image_order(n: int, schedule: Schedule, seed: int) -> list[NDArray[np.int64]]:
    """The images of each step: every epoch is a permutation of its own, its incomplete last batch left out."""
    batch = min(schedule.batch_size, n)
    each = n // batch
    epochs = (np.random.default_rng([seed, ORDER, epoch]).permutation(n) for epoch in range(-(-schedule.steps // each)))
    return [order[i * batch : (i + 1) * batch] for order in epochs for i in range(each)][: schedule.steps]


def augmented(data: Data, items: NDArray[np.int64], schedule: Schedule, seed: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The training images of a step as the net is fed them, and their labels."""
    items = np.sort(items)  # a mapped file is read in one direction; the order within a batch changes nothing
    x, y = data.train_batch(items, device)
    if schedule.augment:
        generator = seeded(seed, AUGMENT, step)
        if pad := data.facts.size // 8:
            x = augment.pad_crop(x, pad, generator)
        if not data.facts.upright:
            x = augment.flip(x, torch.rand(len(x), generator=generator) < 0.5)
    return x.contiguous(memory_format=torch.channels_last), y


def _save(state: Path, net: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    tensors |= {f"momentum.{index}": held["momentum_buffer"] for index, held in optimizer.state_dict()["state"].items()}
    write_tensors(state, tensors | {"losses": torch.tensor(losses, dtype=torch.float64)})


def _resume(state: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """The losses so far. A resume point that cannot be read is worth no more than none."""
    with contextlib.suppress(WorkError, KeyError, RuntimeError):
        tensors, _ = read_tensors(state)
        losses: list[float] = tensors["losses"].tolist()
        buffers = {int(index): {"momentum_buffer": _as_laid_out(tensor)} for index, tensor in below(tensors, "momentum.").items()}
        net.load_state_dict(below(tensors, "net."))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": buffers})
        return losses
    return []


def _as_laid_out(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
