"""This computer, as far as it can be known and set without torch: the processor's name, and how freed memory is kept."""

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def cpu_name() -> str:
    """The model of the processor and how many cores this process may use; with AMX, which virtual machines of one model name may have or lack."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        amx = " with AMX" if "amx_tile" in facts.get("flags", "").split() else ""
        return f"{facts['model name']}{amx}, {len(os.sched_getaffinity(0))} cores"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Tells glibc to keep freed buffers instead of returning them to the system at every step. Elsewhere a no-op."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    except (OSError, AttributeError):
        pass


def release_freed_memory() -> None:
    """Gives back to the system what `keep_freed_memory` kept. Elsewhere a no-op."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> int:
    """Bytes of memory that this process takes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as held:  # noqa: PTH123  # asked for at every block of a net
            return int(held.read().split()[1]) * PAGE
    except OSError:
        return 0
