"""A batch that goes through the net in pieces, of one process or of several: the same pieces, the same step.

What a piece is, the micro-batch, is the recipe's; where it runs is not. A piece has its own random numbers and its own
batch norm, the gradient is the mean over pieces, and so are the running statistics. So one process that takes two pieces
one after the other and two processes that take one each do the same arithmetic.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reslab.data.batches import Batch
from reslab.train.hardware import Machine


def pieces(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch in so many stretches, as equal as can be, for each counts alike: a batch is smaller where images cannot be read."""
    return map(Batch, *(torch.tensor_split(part, min(count, len(batch.items))) for part in batch))


class RunningStatistics:
    """Batch norm's running statistics over a step: every piece sets out from those before it, and what is kept is the mean."""

    def __init__(self, net: nn.Module) -> None:
        self.norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        self.tensors = [tensor for norm in self.norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]
        self.sizes = [tensor.numel() for tensor in self.tensors]

    def read(self) -> Tensor:
        """All of them, as one vector."""
        return torch.cat([tensor.flatten() for tensor in self.tensors]) if self.tensors else torch.zeros(0)

    def rewind(self, before: Tensor) -> None:
        """Lets the next piece set out where the one before it did."""
        self.write(before)
        for norm in self.norms:
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked -= 1  # a step counts once

    def write(self, values: Tensor) -> None:
        """The inverse of `read`."""
        for tensor, part in zip(self.tensors, torch.split(values, self.sizes), strict=True):
            tensor.copy_(part)

    def write_mean(self, total: Tensor, count: int, machine: Machine) -> None:
        """The mean over all pieces of all processes; `total` is the sum over this one's `count`."""
        if not self.tensors:
            return
        summed = machine.total(torch.cat([total, total.new_tensor([count])]))
        self.write(summed[:-1] / summed[-1])
