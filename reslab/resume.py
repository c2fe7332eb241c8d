"""Which run goes on: the one that a person resumes, or the one that torchrun's processes were at before it started them again."""

import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from reslab.errors import CallError, WorkError, shown
from reslab.family import name_of
from reslab.run import Run, write_whole
from reslab.train.hardware import Machine
from reslab.train.recipe import Recipe, find_recipe


def check_same(run: Run, data: Any, net: Any, out: Any, recipe: str | Recipe, fields: dict[str, Any]) -> None:
    """A resumed run keeps its data, net and recipe; saying otherwise is a mistake worth a word."""
    config = run.config
    source = config.get("data", {}).get("source")
    given = str(Path(data).expanduser().resolve()) if data is not None and Path(data).expanduser().exists() else data
    if data is not None and source not in (str(data), str(given)):
        raise CallError(f"a resumed run keeps its data {shown(str(source))}; received {shown(str(data))}: leave it out, or train into a new --out")
    if net is not None and (name_of(net) != config.get("net") or name_of(net) == "custom"):  # of two of those nothing says that they are one
        raise CallError(f"a resumed run keeps its net {config.get('net')}; received {name_of(net)}: leave --net out, or train into a new --out")
    if out is not None and Path(out).resolve() != run.path.resolve():
        raise CallError(f"a resumed run keeps its folder {shown(run.path)}; received {shown(out)}: leave --out out")
    if recipe != "quick":
        raise CallError("a resumed run keeps its recipe: leave --recipe out, or train into a new --out")
    for name, value in find_recipe("quick", **fields).__dict__.items():
        if fields.get(name) is not None and config.get("recipe", {}).get(name) not in (
            value,
            list(value) if isinstance(value, tuple) else value,
        ):
            raise CallError(f"a resumed run keeps its recipe; received {name} {value}: leave it out, or train into a new --out")


def check_unfinished(run: Run) -> None:
    """Raises CallError for a run that has ended, WorkError for one that has no state to go on from."""
    if (run.model / "spec.json").is_file():
        end = "train into a new --out" if (run.path / "report.html").is_file() else f"`reslab report {shown(run.path)}` draws its report, which is missing"
        raise CallError(f"a finished run cannot be resumed; {shown(run.path)} has its model: {end}")
    if not _state(run).is_file():
        raise WorkError(f"a run is resumed from its state; {shown(run.path)} was stopped before its first step and has none: remove it and train again")


def sign(run: Run) -> None:
    """Leaves in a new run's folder which torchrun made it, if one did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        write_whole(_signature(run), _torchrun().encode())


def left_behind(out: str | Path | None, data: str | Path, net: Any, here: Machine) -> Run | None:
    """The run that these processes were at when torchrun started them again; None when they had not begun its first step.

    Only what this torchrun made itself is continued, or removed where it had not begun: any other folder of that name is
    a person's, and the first start was refused for it.
    """
    if out is None:
        raise CallError("processes that are started again find their run by its folder; received no --out: give one, or --resume the run")
    run = Run(out)
    is_ours, begun = here.agree((_is_signed(run), _state(run).is_file()))
    if is_ours and not begun and here.is_writer:
        shutil.rmtree(run.path)
    here.agree(0)
    if not (is_ours and begun):
        return None
    named = None if net is None or name_of(net) == "custom" else net
    check_same(run, data, named, None, "quick", {})  # an id may have been given twice
    return run


def _state(run: Run) -> Path:
    return run.path / "state" / "last.safetensors"


def _signature(run: Run) -> Path:
    return run.path / "state" / "torchrun"


def _is_signed(run: Run) -> bool:
    try:
        return _signature(run).read_text() == _torchrun()
    except (OSError, ValueError):
        return False


def _torchrun() -> str:
    """What tells this torchrun from others: the id that it was given or, without one, its process, which starts ours."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    agent, began = os.getppid(), ""
    with suppress(OSError):  # Linux: numbers of processes come again, with another time since boot
        began = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
        began += Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{platform.node()} {agent} {began}"
