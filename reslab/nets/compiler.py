"""C of ours, compiled for this processor when it is first needed (about a second, nothing is kept), on torch's threads."""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
COMPILER_SECONDS = 60
TYPES = {torch.float32: (), torch.bfloat16: ("-DBF16",)}  # what says so in vectors.h
LANES = 16  # channels in a vector there
FAILURES = OSError, ValueError, subprocess.SubprocessError  # of `compiled`


def compiled(source: Path, *flags: str) -> ctypes.CDLL:
    """A library of that file. Raises one of FAILURES where it cannot be made."""
    if sys.platform != "linux":
        raise OSError("the kernels are for Linux")
    compiler = shlex.split(os.environ.get("CC", "")) or [found for found in [shutil.which("cc")] if found]
    if not compiler:
        raise OSError("no C compiler: cc is not on the path")
    with tempfile.TemporaryDirectory(prefix="reslab-") as folder:
        file = Path(folder) / f"{source.stem}.so"
        call = [*compiler, *FLAGS, *flags, str(source), "-o", str(file), _openmp()]
        subprocess.run(call, check=True, capture_output=True, text=True, errors="replace", timeout=COMPILER_SECONDS)  # noqa: S603  # our own source
        return ctypes.CDLL(str(file))


def told(failure: BaseException) -> str:
    """One of FAILURES in a line."""
    text = failure.stderr if isinstance(failure, subprocess.CalledProcessError) else failure
    return (str(text).strip() or type(failure).__name__).splitlines()[0][:200]


def takes(x: Tensor) -> bool:
    """Whether x are images (N, C, H, W), at least one, where a processor reads them; all else is for torch."""
    return x.dim() == 4 and x.is_cpu and x.numel() > 0


def at(x: Tensor | None) -> int | None:
    """Where a tensor's memory begins."""
    return None if x is None else x.data_ptr()


def _openmp() -> str:
    """torch's own OpenMP, so that both share threads: those of a second one would fight for the same cores."""
    lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()
    loaded = sorted({line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line})
    near = str(Path(torch.__file__).parent)
    for file in [*(file for file in loaded if file.startswith(near)), *(file for file in loaded if Path(file).name.startswith("libgomp.so"))]:
        return file
    raise OSError("torch has not loaded GNU OpenMP, whose threads the kernels share")
