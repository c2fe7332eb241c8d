"""A training's resume point: one safetensors file, written whole. No pickle.

It holds the weights, the optimiser's buffers and the average, and in its header the plain numbers of `Progress`. Random
numbers need no state: each epoch's order and each step's augmentation come from the seed and the number of the step.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reslab.errors import WorkError, shown
from reslab.tensors import below, read_tensors, write_tensors
from reslab.train.optim import Average


@dataclass
class Progress:
    """How far a training is, and what it has seen. Sums run over the current epoch."""

    step: int = 0  # steps done since the beginning
    steps: int = 0  # planned in all
    best_top1: float = -1.0
    best_epoch: int = 0
    stale_epochs: int = 0  # since the last better val top-1
    lr_drops: int = 0
    gentle: bool = False  # still held at warmup_lr
    loss_sum: float = 0.0
    correct: float = 0.0
    seen: int = 0
    seconds: float = 0.0  # since the training began, over all sessions
    step_seconds: float = 0.0  # of these, in training steps


def save_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None, progress: Progress) -> None:
    """Replaces the resume point. Raises WorkError when the disk is full; the old one is kept."""
    tensors: dict[str, Tensor] = {f"net.{name}": t for name, t in net.state_dict().items()}
    for index, buffers in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in buffers.items() if isinstance(t, Tensor)}
    if average:
        tensors |= {f"average.{name}": t for name, t in average.tensors.items()}
    write_tensors(path, tensors, json.dumps(dataclasses.asdict(progress)))


def load_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None) -> Progress:
    """Puts everything back, bit for bit. Raises WorkError for a missing or damaged file, or one of another training."""
    tensors, header = read_tensors(path)
    try:
        progress = Progress(**json.loads(header))
        net.load_state_dict(below(tensors, "net."))
        buffers: dict[int, dict[str, Tensor]] = {}
        for name, tensor in below(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            buffers.setdefault(int(index), {})[key] = tensor.contiguous(memory_format=_format(tensor))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": buffers})
        if average:
            for name, tensor in below(tensors, "average.").items():
                average.tensors[name].copy_(tensor)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise WorkError(f"{shown(path)} is the state of another training: {shown(str(error).splitlines()[0])[:120]}") from error
    return progress


def _format(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
