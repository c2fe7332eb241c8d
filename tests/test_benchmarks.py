"""Every benchmark runs, in the size that means nothing, and leaves the results of the real ones alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from reslab.data.images import Images

FOLDER = Path(__file__).parents[1] / "benchmarks"
PROGRAMS = sorted(file.stem for file in FOLDER.glob("*.py") if "    keep(" in file.read_text("utf-8"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_runs(program: str, cifar: Images) -> None:
    results = FOLDER / "results"
    before = {file.name: file.stat().st_mtime_ns for file in results.iterdir()}
    done = subprocess.run([sys.executable, f"{program}.py", "--smoke"], cwd=FOLDER, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("commit ")
    assert {file.name: file.stat().st_mtime_ns for file in results.iterdir()} == before
