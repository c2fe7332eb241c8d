"""What the machine is, and what it does best: device, precision, threads, memory format, processes.

One training path serves a CPU, a GPU and several; all that differs is decided here.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reslab.host import cpu_name, keep_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """Where a training runs. `rank` and `world` number the processes that torchrun started; alone, 0 of 1."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_writer(self) -> bool:
        """One process writes files and talks."""
        return self.rank == 0

    def place(self, net: nn.Module) -> nn.Module:
        """The net on this device, channels-last."""
        return net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def share(self, net: nn.Module) -> nn.Module:
        """The net as the training step calls it: gradients averaged over processes, batch norm per process."""
        if self.world == 1:
            return net
        return nn.parallel.DistributedDataParallel(net, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def share_buffers(self, net: nn.Module) -> None:
        """Gives every process the writer's running statistics, so that all score the same net."""
        if self.world > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)

    def total(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return list(tensor.tolist())

    def agree(self, value: T) -> T:
        """The writer's value, in every process."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, 0)
        return held[0]

    def autocast(self, precision: str) -> torch.autocast:
        """The context in which the net runs forward."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def has_bf16(self) -> bool:
        """Whether the hardware computes in bf16; elsewhere it is emulated, and slow."""
        if self.device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

    def describe(self) -> dict[str, Any]:
        """What a run records of the machine and its software."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        return {
            "device": str(self.device),
            "name": name,
            "processes": self.world,
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
        }


@contextmanager
def machine() -> Iterator[Machine]:
    """The machine this process is to use. Under torchrun it joins the group, and leaves it at the end."""
    keep_freed_memory()
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Machine(device, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


def synchronise(x: Tensor) -> None:
    """Waits until the device has done its work, so that a clock can be read."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
