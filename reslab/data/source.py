"""`DATA` -> Images: a known name, a folder, a CSV, or shards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from reslab.data.folder import from_csv, from_folder
from reslab.data.images import Images
from reslab.data.named import NAMED, from_name
from reslab.data.shards import INDEX, from_shards
from reslab.errors import CallError, shown, unknown

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def open_images(data: str | Path, progress: Progress = silent) -> Images:
    """The images of a source, not split yet. `progress(what, done, total)` is called while reading or downloading.

    Raises CallError for a name or path that does not exist, WorkError for a source without usable images.
    """
    try:
        path, scheme = Path(data).expanduser(), urlsplit(str(data)).scheme
    except (RuntimeError, ValueError) as error:  # nobody's home, or half a bracket
        raise CallError(f"DATA must be a path, an address or one of {', '.join(NAMED)}; received {shown(str(data))}: {error}") from error
    if str(data) in NAMED:
        return from_name(str(data), progress)
    if scheme in ("http", "https"):
        return from_shards(str(data), progress)
    if (path / INDEX).is_file():
        return from_shards(str(path), progress)
    if path.is_dir():
        return replace(from_folder(path, lambda done, total: progress("reading", done, total)), source=str(path))
    if path.is_file() and path.suffix.lower() == ".csv":
        return from_csv(path, lambda done, total: progress("reading", done, total))
    if path.exists():
        raise CallError(f"DATA must be a folder, a .csv or one of {', '.join(NAMED)}; {shown(path)} is a file")
    if path.name == str(data) and not path.suffix:
        raise unknown("data set or folder", data, NAMED, f" (and there is no folder {shown(path)} here)")
    raise CallError(f"DATA must exist; there is no {shown(path)}: check the path, or use one of {', '.join(NAMED)}")
