"""Fetching an official archive: resumed where it stopped, checked, and only then given its name."""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from reslab.errors import WorkError, shown

CHUNK = 1 << 18


class Archive(NamedTuple):
    """A published file: its name, its MD5 as its authors or torchvision publish it, and where it is served."""

    name: str
    md5: str
    url: str


def fetch(archive: Archive, folder: Path, progress: Callable[[str, int, int], None]) -> Path:
    """The checked archive in `folder`, downloaded if it is not there. `progress(name, bytes done, bytes in all)`.

    An interrupted download is kept as NAME.part and continued. Raises WorkError offline, naming the file to put where,
    and for a file that fails its checksum, which is removed.
    """
    target = folder / archive.name
    if not target.exists():
        part = target.with_name(target.name + ".part")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _download(archive, part, progress)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise WorkError(
                f"{archive.name} is needed and could not be downloaded ({shown(str(reason))}): "
                f"put {archive.url} into {shown(folder)}, or set RESLAB_DATA to the folder that has it"
            ) from error
        if (found := _md5(part)) != archive.md5:
            part.unlink()
            raise WorkError(f"{archive.name} must have MD5 {archive.md5}; what came had {found} and was removed: run the command again")
        part.replace(target)
    elif (found := _md5(target)) != archive.md5:
        raise WorkError(f"{shown(target)} must have MD5 {archive.md5}; it has {found}: remove it, and it will be downloaded")
    return target


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _download(archive: Archive, part: Path, progress: Callable[[str, int, int], None]) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        reply = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        return  # nothing lies beyond what is here: the checksum decides
    with reply:
        if reply.status != 206:
            have = 0
        total = have + int(reply.headers.get("Content-Length") or 0)
        with part.open("ab" if have else "wb") as out:
            while chunk := reply.read(CHUNK):
                out.write(chunk)
                have += len(chunk)
                progress(archive.name, have, total)
    if have < total:
        raise ConnectionError(f"the connection closed after {have} of {total} bytes")
