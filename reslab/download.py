"""Fetching a published file: over the network once, checked, and only then given its name."""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from reslab.errors import WorkError, shown
from reslab.host import expanded

CHUNK = 1 << 18
MAX_BYTES = 4 << 30
MD5_LENGTH = 32
ELSEWHERE = ", or set RESLAB_DATA to the folder that has it"


class Archive(NamedTuple):
    """A published file: its name, its checksum as its authors publish it, and where it is served.

    The checksum is an MD5, a SHA-256, or the first digits of a SHA-256, in hexadecimal; or nothing.
    """

    name: str
    checksum: str
    url: str

    @property
    def kind(self) -> str:
        return "MD5" if len(self.checksum) == MD5_LENGTH else "SHA-256"


def cache() -> Path:
    """Where downloads go: RESLAB_DATA, or ~/.cache/reslab. Raises WorkError where there is no home folder for it."""
    if (folder := expanded(given := os.environ.get("RESLAB_DATA") or "~/.cache/reslab")) is None:
        raise WorkError(f"downloads go into {shown(given)}, and this user has no home folder: set HOME or RESLAB_DATA")
    return folder


def fetch(archive: Archive, folder: Path, progress: Callable[[str, int, int], None], otherwise: str = ELSEWHERE, most: int | None = None) -> Path:
    """The checked archive in `folder`, downloaded if it is not there. `progress(name, bytes done, bytes in all)`.

    An interrupted download is kept as NAME.part and, where a checksum will judge the result, continued. Of several processes
    one downloads, and the others wait. Raises WorkError offline, naming the file to put where (or `otherwise`), for a file of
    more than 4 GiB, or `most` bytes, for a redirect from https to anything else, for a disk that is full, and for a file that fails its
    checksum, which is removed.
    """
    target = folder / archive.name
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # another process may make room at any time
        if not (found := digest(target, archive.kind)).startswith(archive.checksum):
            raise WorkError(f"{shown(target)} must have {archive.kind} {archive.checksum}; it has {found}: remove it, and it will be downloaded")
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(target.with_name(target.name + ".lock")):
            return target if target.exists() else _checked(archive, target, progress, most)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of an address, also one it redirects to, that is none
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise WorkError(
            f"{shown(archive.name)} is needed and could not be downloaded ({shown(str(reason))}): put {shown(archive.url)} into {shown(folder)}{otherwise}"
        ) from error


def _checked(archive: Archive, target: Path, progress: Callable[[str, int, int], None], most: int | None) -> Path:
    part = target.with_name(target.name + ".part")
    if not archive.checksum:
        part.unlink(missing_ok=True)
    _download(archive, part, progress, most)
    if not (found := digest(part, archive.kind)).startswith(archive.checksum):
        part.unlink()
        raise WorkError(f"{archive.name} must have {archive.kind} {archive.checksum}; what came had {found} and was removed: run the command again")
    return part.replace(target)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time, which removes the file when it is done."""
    while True:
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if os.fstat(held.fileno()).st_nlink:  # else it was that of one who is done
                try:
                    yield
                finally:
                    lock.unlink()
                return


def digest(file: Path, kind: str = "SHA-256") -> str:
    """MD5 or SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False) if kind == "MD5" else hashlib.sha256()).hexdigest()


class _StaySecure(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> urllib.request.Request | None:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError(f"it redirects from https to {newurl.partition(':')[0]}, which anybody on the way can change")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(archive: Archive, part: Path, progress: Callable[[str, int, int], None], most: int | None) -> None:
    most = min(most or MAX_BYTES, MAX_BYTES)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        reply = urllib.request.build_opener(_StaySecure).open(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        return  # nothing lies beyond what is here: the checksum decides
    with reply:
        if reply.status != 206:
            have = 0
        length = reply.headers.get("Content-Length") or "0"
        total = have + (int(length) if re.fullmatch("[0-9]{1,15}", length) else 0)
        with part.open("ab" if have else "wb") as out:
            while chunk := reply.read(CHUNK):
                have += len(chunk)
                if max(have, total) > most:
                    part.unlink()
                    raise ConnectionError(f"it has over {most:,} bytes")
                out.write(chunk)
                progress(archive.name, have, total)
    if have < total:
        raise ConnectionError(f"the connection closed after {have} of {total} bytes")
