"""A Run: one folder that holds all that a training produced and needs to be repeated or resumed."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

from reslab.errors import CallError, WorkError, shown

Record = dict[str, Any]
SHIPPED = Path(__file__).parent / "shipped"  # trained nets of our own, each a run folder without its training
UNFINISHED = ".unfinished-"  # so the name of what is being written begins


def located(path: str | Path) -> Path:
    """The path; or, for the name of a shipped net with no run of that name here, where that net is."""
    path, net = Path(path), SHIPPED / Path(path).name
    is_name = path == Path(path.name) and (net / "run.toml").is_file()
    return net if is_name and not (path / "run.toml").is_file() and not (path / "spec.json").is_file() else path


def shipped() -> list[str]:
    """The names of the shipped nets."""
    return sorted(file.parent.name for file in SHIPPED.glob("*/run.toml"))


class Run:
    """`path` and the files in it. `record` appends a measured fact to log.jsonl; fractions are 0 to 1."""

    def __init__(self, path: str | Path, start: float | None = None) -> None:
        self.path = Path(path)
        self.start = time.monotonic() if start is None else start  # records carry seconds since then

    @staticmethod
    def check_free(path: Path) -> None:
        """Raises CallError when a new run cannot go there."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CallError(f"--out must be a new or empty folder; {shown(path)} exists: choose another, or --resume it")
        parent = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), path)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise CallError(f"--out must be writable; {shown(parent)} is not: choose another folder")

    def create(self) -> None:
        """Makes the folder. Raises CallError when it cannot be made."""
        self.check_free(self.path)
        try:
            (self.path / "state").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CallError(f"--out must be writable; {shown(self.path)} is not ({error.strerror}): choose another folder") from error

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """A folder that a training wrote. Raises CallError when it is not one."""
        run = cls(located(path))
        if not (run.path / "run.toml").is_file():
            raise CallError(f"a run is a folder that `reslab train` wrote; {shown(run.path)} has no run.toml: check the path")
        return run

    @property
    def config(self) -> dict[str, Any]:
        """run.toml: all needed to repeat the training."""
        try:
            return tomllib.loads((self.path / "run.toml").read_text("utf-8", "surrogatepass"))
        except (OSError, ValueError) as error:
            raise WorkError(f"{shown(self.path / 'run.toml')} cannot be read: {shown(str(error))}") from error

    @config.setter
    def config(self, value: dict[str, Any]) -> None:
        write_whole(self.path / "run.toml", tomli_w.dumps(_without_none(value)).encode("utf-8", "surrogatepass"))

    @property
    def is_shipped(self) -> bool:
        """Whether it came with the package, where nothing is to be written."""
        return self.path.parent == SHIPPED

    @property
    def model(self) -> Path:
        """The artefact: what `reslab.load` reads."""
        return self.path / "model"

    def record(self, kind: str, **facts: Any) -> None:
        """Appends one line to log.jsonl."""
        line = json.dumps({"kind": kind, "time": round(time.monotonic() - self.start, 3), **facts}, allow_nan=False)
        try:
            with (self.path / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(line + "\n")
        except OSError as error:
            raise WorkError(f"{shown(self.path / 'log.jsonl')} cannot be written: {error.strerror}; what is in it is kept") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts, no other process can say the same of this folder. Raises CallError where one does.

        The lock goes with its process, however that ends, and is not handed on to processes that it starts.
        """
        with (self.path / "state" / "lock").open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise CallError(f"one process trains a run at a time; {shown(self.path)} is being trained now: wait for it, or end it first") from error
            except OSError:  # a disk without locks
                pass
            yield

    def mend(self) -> None:
        """After a crash: ends a line that it cut short, so that the next record does not run into it, and drops what is half written."""
        log = self.path / "log.jsonl"
        if log.exists() and not log.read_bytes().endswith(b"\n"):
            with log.open("ab") as out:
                out.write(b"\n")
        for folder in (self.path, self.path / "state", self.model):
            for left in folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)

    def records(self, *kinds: str) -> Iterator[Record]:
        """The records of the given kinds, or all, in order. A line that is none, as one that a crash cut short, is passed over."""
        try:
            lines = (self.path / "log.jsonl").read_text("utf-8").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and (not kinds or record.get("kind") in kinds):
                yield record

    def last(self, kind: str) -> Record | None:
        """The newest record of a kind."""
        return next(reversed(list(self.records(kind))), None)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash it holds either all of `data` or what it held before. A link stays a link.

    Of processes that write the same file at once, the last one's data is what it holds.
    Raises WorkError when it cannot, and for what is there and no file: a folder, or a device, which must not be replaced.
    """
    if path.exists() and not path.is_file():
        raise WorkError(f"{shown(path)} cannot be written: it is not a regular file; name another")
    path = path.resolve()
    with workplace(path) as folder:
        temporary = folder / "whole.tmp"
        with temporary.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, so that what is finished moves there in one step and what failed is gone.

    Raises WorkError for what the disk refuses.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=UNFINISHED) as folder:
            yield Path(folder)
    except OSError as error:
        raise WorkError(f"{shown(target)} cannot be written: {error.strerror or shown(str(error))}; what was there is kept") from error


def _without_none(value: Any) -> Any:
    """TOML has no null: what is None is left out."""
    if isinstance(value, dict):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list | tuple) else value
