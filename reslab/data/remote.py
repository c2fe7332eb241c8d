"""Files of a data set that lies elsewhere: fetched when they are needed, checked, and only so many kept."""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urljoin, urlsplit

from reslab.download import Archive, cache, fetch
from reslab.errors import CallError, WorkError, shown

MAX_INDEX = 64 << 20  # bytes
LOCAL = ("localhost", "127.0.0.1", "::1")
TRIES, PATIENCE = 5, 2.0  # seconds before the second try; each next one waits twice as long


class Named(Protocol):
    """A file with its checksum."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Cache:
    """The files below an address. Of the large ones the `kept` last used stay on disk; several processes may share them."""

    address: str
    kept: int

    @property
    def folder(self) -> Path:
        return cache() / "shards" / hashlib.sha256(self.address.encode()).hexdigest()[:16]

    def file(self, shard: Named) -> Path:
        """The shard, fetched if it is not here; others make room. Raises WorkError when it cannot be had."""
        path = self.folder / shard.name
        try:
            os.utime(path)
        except FileNotFoundError:
            self.fetched(shard.name, shard.sha256)
            self._make_room(path)
        return path

    def fetched(self, name: str, sha256: str) -> Path:
        """A file by its checksum. Raises WorkError after five tries."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder / f"{name}.lock"):
            for attempt in range(TRIES):
                try:
                    return fetch(Archive(name, sha256, urljoin(self.address, name)), self.folder, lambda what, done, total: None, ": the run can be resumed")
                except WorkError:
                    if attempt == TRIES - 1:
                        raise
                    time.sleep(PATIENCE * 2**attempt)
        raise AssertionError

    def _make_room(self, newest: Path) -> None:
        ages = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                ages.append((path.stat().st_mtime, path))
        for _, path in sorted(ages)[: max(0, len(ages) - self.kept)]:
            if path != newest:
                path.unlink(missing_ok=True)


def read_url(address: str) -> bytes:
    """A small file. Raises CallError for an address that anybody on the way can change, WorkError when it cannot be had."""
    parts = urlsplit(address)
    if parts.scheme != "https" and parts.hostname not in LOCAL:
        raise CallError(f"data from elsewhere comes over https; received {shown(address)}: use https, or a folder")
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = fetch(Archive("index", "", address), Path(folder), lambda what, done, total: None)
        except WorkError as error:
            raise WorkError(f"{shown(address)} is needed and could not be had ({shown(str(error.__cause__ or error))}): check the address") from error
        if file.stat().st_size > MAX_INDEX:
            raise WorkError(f"an index has at most {MAX_INDEX >> 20} MiB; {shown(address)} has {file.stat().st_size:,} bytes")
        return file.read_bytes()


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
