"""This computer, as far as it can be known and set without torch: processor, memory, the user's folder, signals.

How memory is kept is glibc's and Linux's, in this process alone, and a no-op elsewhere. With RESLAB_MALLOC=default in the
environment memory is left as it is, but for what `release_freed_memory` gives back.
"""

import ctypes
import hashlib
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from mmap import PAGESIZE as PAGE
from pathlib import Path
from types import FrameType

CGROUPS = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MADV_COLLAPSE = 25  # linux/mman.h, since 6.1
HUGE = 2 << 20  # bytes of a huge page
FEW, MANY = 8, 64  # huge pages that are not worth another call, and as many as one call is for


def cores() -> int:
    """How many of them this process may use: the machine's, or as many as the time that its control group (a container) is allowed amounts to."""
    least = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, old in _groups("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):  # "max" is no limit, -1 an old one's
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if old else ("cpu.max",)
            quota, period = map(int, " ".join((folder / name).read_text("ascii") for name in names).split())
            least = min(least, math.ceil(quota / period)) if quota > 0 else least
    return least


def cpu_name() -> str:
    """The model of the processor and how many cores this process may use; with AMX, which virtual machines of one model name may have or lack."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        amx = " with AMX" if "amx_tile" in facts.get("flags", "").split() else ""
        return f"{facts['model name']}{amx}, {cores()} cores"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def cpu_mark() -> str:
    """A name that only processors of one model with the same abilities have; code that is compiled for one may be wrong on others."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0].splitlines()
        told = sorted(line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "CPU implementer", "CPU part", "Features"))
    except OSError:
        told = [platform.processor(), platform.machine()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def memory() -> int:
    """Bytes that this process may use: the machine's, or less where its control group (a container, a batch job) or one above is allowed less."""
    least = PAGE * os.sysconf("SC_PHYS_PAGES")
    for folder, old in _groups("memory"):
        with suppress(OSError, ValueError):  # "max" is no limit
            least = min(least, int((folder / ("memory.limit_in_bytes" if old else "memory.max")).read_text("ascii")))
    return least


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's control group and those above, and whether they are of Linux's first kind, a tree for each controller."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text("utf-8", "replace").splitlines():
            _, controllers, name = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                group = (CGROUPS / controller if controllers else CGROUPS) / name.lstrip("/")
                # In a container the group may be named as it is outside: then the limit is that of the root
                yield from ((folder, bool(controllers)) for folder in (group, *group.parents))


def expanded(path: str) -> Path | None:
    """The path with its ~ replaced; None where that cannot be, as under a user id without a name in a container."""
    with suppress(RuntimeError):
        return Path(path).expanduser()
    return None


def end_on_signals() -> None:
    """SIGTERM and SIGHUP end this process by an exception, as Ctrl-C does, so that what is half done is put away. What is ignored (nohup) stays so."""
    with suppress(ValueError):  # not the main thread: whoever started us there handles signals
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed buffers instead of returning them to the system at every step."""
    if _left_alone():
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def use_huge_pages(within: float) -> None:
    """Puts what the heap holds now onto pages of 2 MiB, whose addresses the processor looks up less often.

    Begins no more of them after `within` seconds: a page takes a virtual machine up to 7 ms.
    """
    if _left_alone():
        return
    until = time.monotonic() + within
    with suppress(OSError, AttributeError):
        madvise = ctypes.CDLL("libc.so.6").madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
            if line.endswith("[heap]"):
                begin, end = (int(place, 16) for place in line.split()[0].split("-"))
                first, last = -(-begin // HUGE), end // HUGE
                for page in range(first, last, MANY):
                    if time.monotonic() < until:
                        _collapse(madvise, page, min(page + MANY, last))


def _collapse(madvise: Callable[[int, int, int], int], first: int, last: int) -> None:
    """Huge pages from the `first` to before the `last`, where they can be had. Linux ends at one that cannot: what failed is tried again by halves."""
    if madvise(first * HUGE, (last - first) * HUGE, MADV_COLLAPSE) and last - first > FEW:
        middle = (first + last) // 2
        _collapse(madvise, first, middle)
        _collapse(madvise, middle, last)


def release_freed_memory() -> None:
    """Gives back to the system what `keep_freed_memory` kept."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> int:
    """Bytes of memory that this process takes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as held:  # noqa: PTH123  # asked for at every block of a net
            return int(held.read().split()[1]) * PAGE
    except OSError:
        return 0


def _left_alone() -> bool:
    return os.environ.get("RESLAB_MALLOC") == "default"
