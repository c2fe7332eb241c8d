"""The image files that a command names: files, folders, patterns."""

import glob
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from reslab.data.folder import image_paths
from reslab.errors import CallError, shown


def image_files(images: tuple[str, ...], verb: str) -> Iterator[Path]:
    """Files as given, the image files of folders, and what patterns match; folders are read as the answer is.

    Raises CallError, in the name of `verb`, when there is none.
    """
    found = _named(images)
    first = next(found, None)
    if first is None:
        raise CallError(f"{verb} needs image files; received {' '.join(map(shown, images)) or 'none'}, which names no image: give files, folders or patterns")
    return itertools.chain([first], found)


def _named(images: tuple[str, ...]) -> Iterator[Path]:
    for given in images:
        path = Path(given).expanduser()
        if os.path.isdir(path):  # noqa: PTH112  # a path that is too long, or may not be looked at, is said to be none
            yield from image_paths(path)
        elif glob.has_magic(given) and not os.path.exists(path):  # noqa: PTH110  # likewise
            found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  # patterns may be absolute
            yield from [name for name in map(Path, found) if not name.is_dir()] or [Path(given)]
        else:
            yield path
