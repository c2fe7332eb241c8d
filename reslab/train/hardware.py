"""What the machine is, and what it does best: device, precision, threads, memory format, processes.

One training path serves a CPU, a GPU and several; all that differs is decided here.
"""

import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reslab.errors import WorkError
from reslab.host import cores, cpu_mark, cpu_name, expanded, keep_freed_memory, memory, release_freed_memory, resident

PIXEL_SHARE = 0.25  # of a GPU's free memory, at most, for pixels
PATIENCE = timedelta(hours=2)  # of processes while one reads or downloads the data; an end of one of them is noticed at once
LET_GO = 0.1  # seconds for gloo's threads to drop the last tensors, for which they need the interpreter: one that asks for it while it ends aborts the process

T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Machine:
    """Where a training runs. `rank` and `world` number the processes that torchrun started; alone, 0 of 1."""

    device: torch.device
    rank: int = 0
    world: int = 1
    restarts: int = 0  # how often torchrun has started the processes again

    @property
    def is_writer(self) -> bool:
        """One process writes files and talks."""
        return self.rank == 0

    @property
    def decoders(self) -> int:
        """How many processes decode images while this one trains: on a GPU the cores have little else to do."""
        return max(2, cores() // self.sharers) if self.device.type == "cuda" else 2

    @property
    def sharers(self) -> int:
        """How many processes of this training share this computer."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def place(self, net: N) -> N:
        """The net on this device, channels-last."""
        return net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def share(self, net: nn.Module) -> nn.Module:
        """The net as the training step calls it: gradients averaged over processes, batch norm's statistics by each on its own."""
        if self.world == 1:
            return net
        devices = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames the option to one that older versions lack
            return nn.parallel.DistributedDataParallel(net, devices, broadcast_buffers=False)

    def gather_later(self, shared: nn.Module) -> AbstractContextManager[None]:
        """A context whose backward passes add to this process's gradients only; the next one outside it averages over processes."""
        return shared.no_sync() if isinstance(shared, nn.parallel.DistributedDataParallel) else nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """`values`, changed in place to their sums over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

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

    @property
    def replays(self) -> bool:
        """Whether work can be recorded and replayed: on a GPU, by a process that waits for no other."""
        return self.device.type == "cuda" and self.world == 1

    def held(self) -> int:
        """Bytes that this process holds: resident memory, on a GPU what tensors take there."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        release_freed_memory()
        return resident()

    def release(self) -> None:
        """Gives back memory that was freed."""
        release_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def place_of_pixels(self, count: int) -> torch.device:
        """Where so many bytes of images are kept: on a GPU where they take at most a quarter of what is free there."""
        if self.device.type == "cuda" and count > PIXEL_SHARE * torch.cuda.mem_get_info(self.device)[0]:
            return torch.device("cpu")
        return self.device

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
            "memory_gib": round(memory() / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
        }


@contextmanager
def machine() -> Iterator[Machine]:
    """The machine this process is to use. Under torchrun it joins the group, and leaves it at the end."""
    keep_freed_memory()
    _keep_compiled()
    if cores() < torch.get_num_threads():  # torch does not know what a container is allowed
        torch.set_num_threads(cores())
    names = ("RANK", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
    rank, local, restarts = (int(os.environ.get(name, "0")) for name in names)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True  # so that a seed means the same every time; it cost nothing at ResNet-50 (docs/log.md)
    if world > 1:
        _join("nccl" if device.type == "cuda" else "gloo", restarts)
    try:
        yield Machine(device, rank, world, restarts)
    except RuntimeError as error:
        if world > 1 and _is_loss_of_contact(error):
            raise WorkError(
                "another process of this training ended; torchrun --max-restarts N starts them again, and they go on from the last state"
            ) from error
        raise
    finally:
        if world > 1:
            dist.destroy_process_group()
            time.sleep(LET_GO)


def _keep_compiled() -> None:
    """What torch.compile made is kept where only this user writes, as torch runs what it finds there. Where that cannot be, torch's place in /tmp has to do."""
    folder = expanded(f"~/.cache/reslab/compiled-{cpu_mark()}")  # machines may share a home, and torch does not ask which one compiled
    with suppress(OSError):
        if folder and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            folder.mkdir(parents=True, exist_ok=True)
            if folder.stat().st_uid == os.getuid():
                folder.chmod(0o700)  # fails on a disk that is read-only
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _join(backend: str, restarts: int) -> None:
    """Meets the other processes under names that are this start's own.

    On one machine torchrun 2.13 starts processes again with the store that the last ones left, and gloo then finds the
    addresses of the dead. Of several machines the counts need not agree; there each start has a new store.
    """
    store, rank, world = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(f"start{restarts}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)


def synchronise(x: Tensor) -> None:
    """Waits until the device has done its work, so that a clock can be read."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _is_loss_of_contact(error: RuntimeError) -> bool:
    """Whether a process can no longer reach the others: an error class of NCCL's, a message of gloo's."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
