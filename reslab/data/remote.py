"""Files of a data set that lies elsewhere: fetched when they are needed, checked, and only so many kept."""

import contextlib
import hashlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.error import HTTPError
from urllib.parse import urljoin, urlsplit

from reslab.download import Archive, cache, fetch
from reslab.errors import CallError, WorkError, shown

MAX_INDEX = 64 << 20  # bytes
LOCAL = ("localhost", "127.0.0.1", "::1")
BUSY = (408, 429)  # answers that another may follow: a timeout, and too many requests
TRIES, PATIENCE = 5, 2.0  # seconds before the second try; each next one waits twice as long


class Named(Protocol):
    """A file with its checksum."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Cache:
    """The files below an address, each in a folder named by its checksum: what is published anew is fetched anew.

    Of the large ones the `kept` last used stay on disk; several processes may share them.
    """

    address: str
    kept: int

    @property
    def folder(self) -> Path:
        return cache() / "shards" / hashlib.sha256(self.address.encode()).hexdigest()[:16]

    def open(self, shard: Named) -> BinaryIO:
        """The shard, fetched if it is not here; others make room. Raises WorkError when it cannot be had."""
        path = self._place(shard.sha256) / shard.name
        try:
            while True:
                with contextlib.suppress(FileNotFoundError):  # it is not here yet, or another process has just made room
                    os.utime(path)
                    return path.open("rb", buffering=0)
                self.fetched(shard.name, shard.sha256, ", and --resume a training")
                self._make_room(path)
        except OSError as error:  # no fault of the image
            raise WorkError(
                f"shards from elsewhere are kept in {shown(self.folder)}; it refuses ({error.strerror}): make room or set RESLAB_DATA, and --resume"
            ) from error

    def fetched(self, name: str, sha256: str, otherwise: str = "", most: int | None = None) -> Path:
        """A file of at most so many bytes by its checksum. Raises WorkError after five tries, or one where more do not help."""
        archive = Archive(name, sha256, urljoin(self.address, name))
        for attempt in range(TRIES):
            try:
                return fetch(archive, self._place(sha256), lambda what, done, total: None, otherwise, most)
            except WorkError as error:
                refused = isinstance(error.__cause__, HTTPError) and 400 <= error.__cause__.code < 500 and error.__cause__.code not in BUSY
                if attempt == TRIES - 1 or refused or (self._place(sha256) / name).exists():  # what is here has another checksum
                    raise
                time.sleep(PATIENCE * 2**attempt)
        raise AssertionError

    def _place(self, sha256: str) -> Path:
        return self.folder / sha256[:16]

    def _make_room(self, newest: Path) -> None:
        ages = []
        for path in self.folder.glob("*/*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                ages.append((path.stat().st_mtime, path))
        for _, path in sorted(ages)[: max(0, len(ages) - self.kept)]:
            if path != newest:
                path.unlink(missing_ok=True)


def read_url(address: str) -> bytes:
    """A small file. Raises CallError for an address that anybody on the way can change, WorkError when it cannot be had."""
    parts = urlsplit(address)
    if not address.isascii():
        raise CallError(f"an address is written in ASCII; received {shown(address)}: write other letters as %XX")
    if parts.scheme != "https" and parts.hostname not in LOCAL:
        raise CallError(f"data from elsewhere comes over https; received {shown(address)}: use https, or a folder")
    with tempfile.TemporaryDirectory() as folder:
        try:
            return fetch(Archive("index", "", address), Path(folder), lambda what, done, total: None, most=MAX_INDEX).read_bytes()
        except WorkError as error:
            raise WorkError(f"{shown(address)} is needed and could not be had ({shown(str(error.__cause__ or error))}): check the address") from error
