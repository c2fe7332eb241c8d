import mmap
import os
import pwd
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from reslab import host
from reslab.data.named import roots
from reslab.download import cache
from reslab.errors import WorkError
from reslab.host import cores, cpu_mark, cpu_name, memory, use_huge_pages
from reslab.nets.compiler import _openmp


@pytest.mark.parametrize(("flags", "name"), [("fpu amx_tile amx_bf16", "A Processor with AMX"), ("fpu avx512_bf16", "A Processor")])
def test_a_processors_name_tells_those_with_amx_from_those_without(flags: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = f"processor\t: 0\nmodel name\t: A Processor\nflags\t\t: {flags}\n\nprocessor\t: 1\nmodel name\t: A Processor\nflags\t\t: {flags}\n"
    monkeypatch.setattr(Path, "read_text", lambda *_: told)
    monkeypatch.setattr(host, "cores", lambda: 2)
    assert cpu_name() == f"{name}, 2 cores"


def test_code_that_one_processor_compiled_is_not_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def mark(flags: str, mhz: str = "2000") -> str:
        told = f"processor\t: 0\nmodel name\t: A\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n\nprocessor\t: 1\n"
        monkeypatch.setattr(Path, "read_text", lambda *_: told)
        return cpu_mark()

    assert mark("fpu avx2") != mark("fpu avx2 avx512f")
    assert mark("fpu avx2") == mark("fpu avx2", "3000")


def test_without_cpuinfo_there_is_a_name_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: "processor : 0\n")
    assert cpu_name()


HELD = """
import ctypes, re, sys
from pathlib import Path
from reslab.host import HUGE, keep_freed_memory, use_huge_pages
keep_freed_memory()
held = [bytearray(6 << 20) for _ in range(16)]
for part in held:
    part[::1024] = b"resnet" * 1024
hole = held.pop(1)  # a page in it is nowhere, as of memory that was never written to
at = -(-ctypes.addressof(ctypes.c_char.from_buffer(hole)) // HUGE) * HUGE
ctypes.CDLL("libc.so.6").madvise(ctypes.c_void_p(at), ctypes.c_size_t(HUGE), 4)  # MADV_DONTNEED
use_huge_pages(60.0)
assert all(part[::1024] == b"resnet" * 1024 for part in held)
heap = Path("/proc/self/smaps").read_text().partition("[heap]")[2].partition("VmFlags")[0]
print(*(re.search(name + r":\\s+(\\d+)", heap)[1] for name in ("Size", "AnonHugePages")))
"""


def huge_pages() -> str:
    """When this system makes them."""
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return file.read_text() if file.is_file() else "it has none"


@pytest.mark.skipif("[madvise]" not in huge_pages(), reason=f"huge pages are not for those who ask for them here: {huge_pages().strip()}")
def test_the_heap_keeps_what_is_freed_on_huge_pages_unless_it_is_to_be_left_alone() -> None:
    def kib(**environment: str) -> tuple[int, ...]:
        done = subprocess.run([sys.executable, "-c", HELD], env={**os.environ, **environment}, check=True, capture_output=True, text=True)
        return tuple(map(int, done.stdout.split()))

    size, huge = kib(RESLAB_MALLOC="")
    assert size > 96 << 10, "buffers of 6 MiB are on the heap"
    if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 1):
        assert huge > 72 << 10, "a page that cannot be had keeps none but its neighbours"
    size, huge = kib(RESLAB_MALLOC="default")
    assert (size < 24 << 10, huge) == (True, 0), "they are maps of their own"


def test_no_more_huge_pages_are_asked_for_once_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[int] = []
    heap = f"{10 * host.HUGE - 5:x}-{210 * host.HUGE + 5:x} rw-p 00000000 00:00 0 [heap]\n"
    monkeypatch.setattr(Path, "read_text", lambda *_: heap)
    monkeypatch.setattr(host, "_collapse", lambda madvise, first, last: pages.extend(range(first, last)))
    monkeypatch.delenv("RESLAB_MALLOC", raising=False)
    use_huge_pages(0.0)
    assert not pages
    use_huge_pages(60.0)
    assert pages == list(range(10, 210)), "each once, and none that is not wholly on the heap"


def test_a_mapped_file_may_have_a_name_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(file)).write_bytes(b"x" * 4096)
    with Path(os.fsdecode(file)).open("r+b") as stream, mmap.mmap(stream.fileno(), 0):
        monkeypatch.delenv("RESLAB_MALLOC", raising=False)
        use_huge_pages(0.0)
        with suppress(OSError):  # a torch with another OpenMP
            assert _openmp().count("libgomp") == 1


def control_groups(line: str, limits: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in limits.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(limit)
    monkeypatch.setattr(host, "CGROUPS", folder)
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *words: line if str(self) == "/proc/self/cgroup" else read(self, *words))


@pytest.mark.parametrize(
    ("line", "limits", "least"),
    [
        ("0::/job/step", {"job/step/memory.max": "max\n", "job/memory.max": "4096\n", "memory.max": "8192\n"}, 4096),
        ("0::/outside/the/container", {"memory.max": "8192\n"}, 8192),
        ("5:cpu:/job\n4:cpuset,memory:/job", {"memory/job/memory.limit_in_bytes": "4096", "memory.max": "8"}, 4096),
        ("0::/job", {"job/memory.max": "max", "memory.max": f"{1 << 62}"}, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    ],
    ids=["of a group above", "of a container", "version 1", "none"],
)
def test_memory_is_what_the_control_group_allows(line: str, limits: dict[str, str], least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups(line, limits, tmp_path, monkeypatch)
    assert memory() == least


@pytest.mark.parametrize(
    ("line", "limits", "least"),
    [
        ("0::/job", {"job/cpu.max": "max 100000\n", "cpu.max": "150000 100000\n"}, 2),
        ("0::/job", {"job/cpu.max": "20000 100000\n"}, 1),
        ("4:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "300000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "-1\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 4),
    ],
    ids=["of a group above", "less than one", "version 1", "none"],
)
def test_cores_are_as_many_as_the_control_group_allows(line: str, limits: dict[str, str], least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4))
    control_groups(line, limits, tmp_path, monkeypatch)
    assert cores() == least


def test_a_home_that_nobody_has_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setenv("RESLAB_DATA", "/data")
    monkeypatch.delenv("KERAS_HOME", raising=False)
    assert roots() == [Path("/data"), Path("data")]
    assert cache() == Path("/data")
    monkeypatch.delenv("RESLAB_DATA")
    with pytest.raises(WorkError, match="set HOME or RESLAB_DATA"):
        cache()
