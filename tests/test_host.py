import os
from pathlib import Path

import pytest

from reslab.host import cpu_name

CORES = f"{len(os.sched_getaffinity(0))} cores"


@pytest.mark.parametrize(("flags", "name"), [("fpu amx_tile amx_bf16", "A Processor with AMX"), ("fpu avx512_bf16", "A Processor")])
def test_a_processors_name_tells_those_with_amx_from_those_without(flags: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = f"processor\t: 0\nmodel name\t: A Processor\nflags\t\t: {flags}\n\nprocessor\t: 1\nmodel name\t: A Processor\nflags\t\t: {flags}\n"
    monkeypatch.setattr(Path, "read_text", lambda *_: told)
    assert cpu_name() == f"{name}, {CORES}"


def test_without_cpuinfo_there_is_a_name_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: "processor : 0\n")
    assert cpu_name()
