"""Images from disk: a tree with one folder a class, or a CSV of `path,label`. Nothing is copied or changed.

Links are followed only to files inside the tree. What is no usable image is left out and listed with the reason.
"""

import csv
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from reslab.data.decode import Header, Unreadable, formats, read_header
from reslab.data.images import SPLITS, Images, Note, Problem, digest, in_threads, read_image
from reslab.errors import CallError, WorkError, shown

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

RUN = 10_000  # entries of a folder that are sorted together
FIELD = 80  # characters of a CSV's field that an error shows
FOLDER_LINK = "a link to a folder; only links to files inside the tree are followed"


class Item(NamedTuple):
    """A file that should be an image, before it was opened."""

    path: Path
    name: str
    label: str
    declared: str


def from_folder(root: Path, progress: Callable[[int, int], None]) -> Images:
    """Images of a tree: `class/**/file`, or `train|val|test/class/**/file`.

    Raises WorkError when there is no class folder, no image, or no readable one.
    """
    notes: list[Note] = []
    problems: list[Problem] = []
    parts = _parts(root, notes)
    items: list[Item] = []
    classes: set[str] = set()
    for declared, top in parts:
        for folder in sorted(_subfolders(top), key=lambda p: _natural(p.name)):
            if folder.is_symlink():
                problems.append(Problem(_name(folder, root), FOLDER_LINK))
                continue
            classes.add(folder.name)
            items += [Item(path, _name(path, root), folder.name, declared) for path in _image_files(folder, root, problems)]
        loose = sum(1 for path in top.iterdir() if path.is_file() and _looks_like_image(path))
        if loose:
            notes.append(Note(f"{loose} image(s) directly in {_name(top, root)} have no class folder and were left out"))
    if not classes:
        raise WorkError(f"a data folder has one sub-folder a class; {shown(root)} has none: put the images of each class into a folder of its own")
    if not items:
        raise WorkError(f"no images were found below {shown(root)}: put files such as .jpg or .png into its class folders")
    empty = sorted(classes - {item.label for item in items}, key=_natural)
    notes += [Note(f"class folder {shown(name)} is empty", is_problem=True) for name in empty]
    return _read(root.resolve().name, str(root), items, problems, notes, progress)


def from_csv(file: Path, progress: Callable[[int, int], None]) -> Images:
    """Images of a CSV with the columns path and label, and maybe split; paths are relative to the CSV.

    Raises WorkError when a column or a named file is missing.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            rows, columns = list(reader), reader.fieldnames or []
    except UnicodeDecodeError as error:
        raise WorkError(f"a CSV must be UTF-8 text; {shown(file)} is not: save it as CSV UTF-8") from error
    except csv.Error as error:  # what a quote swallows is one field
        raise WorkError(f"each quote in a CSV must be closed; {shown(file)} cannot be read ({shown(str(error))}): correct it") from error
    for needed in ("path", "label"):
        if needed not in columns:
            have = _brief(", ".join(columns)) or "no rows"
            raise WorkError(f"the CSV must have the columns path and label; {shown(file)} has {have}: add a first line path,label")
    if not rows:
        raise WorkError(f"the CSV must have a row an image; {shown(file)} has its first line only: add the images")
    items = []
    for row in rows:
        name, label, declared = (row.get("path") or "").strip(), (row.get("label") or "").strip(), (row.get("split") or "").strip().lower()
        if not name or not label:
            received = f"{_brief(name)!r},{_brief(label)!r}"
            raise WorkError(f"every row of the CSV needs a path and a label; {shown(file)} has {received}: fill them in")
        if declared and declared not in SPLIT_FOLDERS:
            raise WorkError(f"the column split may hold train, val or test; {shown(file)} has {_brief(declared)!r}: correct it")
        items.append(Item(file.parent / name, name, label, SPLIT_FOLDERS.get(declared, "")))
    missing = [item.name for item in items if not item.path.is_file()]
    if missing:
        raise WorkError(
            f"every path in the CSV must be a file; {len(missing)} of {len(items)} are not, first {_brief(missing[0])!r}: "
            f"paths are relative to {shown(file.parent)}"
        )
    return _read(file.stem, str(file), items, [], [], progress)


def image_paths(folder: Path) -> Iterator[Path]:
    """The image files below a folder, as they are found: memory does not grow with their number.

    A folder's own files come before its sub-folders, both in natural order; a folder of more than 10,000 entries is sorted
    in runs of so many, as the file system lists them. Links that leave `folder` and hidden files are passed over; a folder
    that cannot be read is given itself.
    """
    pending = [folder]
    while pending:
        below: list[str] = []
        here = pending.pop()
        try:
            with os.scandir(here) as entries:
                while run := list(islice(entries, RUN)):
                    below += [entry.name for entry in run if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")]
                    files = [entry.name for entry in run if not entry.is_dir(follow_symlinks=False)]
                    yield from _images_of(here, sorted(files, key=_natural), folder, [])
        except OSError:
            yield here  # cannot be read: whoever tries says why
        pending += [here / name for name in sorted(below, key=_natural, reverse=True)]


def _read(name: str, source: str, items: list[Item], problems: list[Problem], notes: list[Note], progress: Callable[[int, int], None]) -> Images:
    headers: list[Header] = []
    digests: list[str] = []
    good: list[Item] = []
    for item, result in zip(items, in_threads(lambda i: _open(items[i]), len(items), progress), strict=True):
        if isinstance(result, str):
            problems.append(Problem(item.name, result))
        else:
            good.append(item)
            headers.append(result[0])
            digests.append(result[1])
    if not good:
        raise WorkError(f"none of the {len(items)} files in {shown(source)} is a readable image; first {shown(problems[0].name)!r}: {problems[0].reason}")
    classes = sorted({item.label for item in good}, key=_natural)
    lost = sorted({item.label for item in items} - set(classes), key=_natural)
    notes += [Note(f"class {shown(label)} is empty: none of its files is readable", is_problem=True) for label in lost]
    number = {label: index for index, label in enumerate(classes)}
    return Images(
        name=name,
        classes=tuple(classes),
        labels=np.array([number[item.label] for item in good], dtype=np.int64),
        names=[item.name for item in good],
        digests=digests,
        sizes=np.array([(h.width, h.height) for h in headers], dtype=np.int32),
        channels=1 if all(h.grey for h in headers) else 3,
        declared=[item.declared for item in good],
        paths=[item.path for item in good],
        problems=tuple(problems),
        notes=tuple(notes),
        source=source,
        upright=all(len(label) == 1 for label in classes),  # classes named 0-9 or A-Z are characters
    )


def _open(item: Item) -> tuple[Header, str] | str:
    try:
        data = read_image(item.path)
        return read_header(data), digest(data)
    except Unreadable as error:
        return str(error)


def _parts(root: Path, notes: list[Note]) -> list[tuple[str, Path]]:
    """[(split, folder that holds the class folders)]. A tree is split where train/ has class folders and val/ or test/ or nothing is beside it."""
    try:
        folders = _subfolders(root)
    except OSError as error:
        raise CallError(f"{shown(root)} cannot be read ({error.strerror}): check its permissions") from error
    named = [(SPLIT_FOLDERS.get(folder.name.lower(), ""), folder) for folder in folders]
    splits = [(part, folder) for part, folder in named if part and _subfolders(folder) and not folder.is_symlink()]
    if "train" not in {part for part, _ in splits} or {part for part, _ in named} == {"train", ""}:
        return [("", root)]  # a folder called train beside other folders, none of them val or test, is a class
    for part, folder in named:
        if (part, folder) not in splits:
            notes.append(Note(f"folder {shown(folder.name)} {'has no class folders' if part else 'is none of train, val and test'} and was left out"))
    return sorted(splits, key=lambda pair: SPLITS.index(pair[0]))


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _image_files(folder: Path, root: Path, problems: list[Problem]) -> Iterator[Path]:

    def refused(error: OSError) -> None:
        problems.append(Problem(_name(Path(error.filename), root), error.strerror or "cannot be read"))

    for current, folders, files in os.walk(folder, onerror=refused):  # does not follow links to folders, so no loop is entered
        for name in folders:
            if (path := Path(current, name)).is_symlink():
                problems.append(Problem(_name(path, root), FOLDER_LINK))
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=_natural)
        yield from _images_of(Path(current), sorted(files, key=_natural), root, problems)


def _images_of(folder: Path, names: list[str], root: Path, problems: list[Problem]) -> Iterator[Path]:
    """Those that are named like images and do not lead out of `root`."""
    for name in names:
        path = folder / name
        if name.startswith(".") or not _looks_like_image(path):
            continue
        if path.is_symlink() and not _inside(path, root):
            problems.append(Problem(_name(path, root), "a link that leaves the folder, loops or leads nowhere"))
            continue
        yield path


def _looks_like_image(path: Path) -> bool:
    return Image.registered_extensions().get(path.suffix.lower()) in formats()


def _inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a dangling link, or a loop
        return False


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _brief(text: str) -> str:
    """Its beginning, for an error: a stray quote makes one field of many lines."""
    return shown(text[:FIELD]) + "..." * (len(text) > FIELD)


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Numbers in names by value and before words, so that class 10 comes after class 9; of equals, as 1 and 01, by their digits."""
    parts = re.split(r"(\d{1,18})", name)
    return [(int(part), "") if part.isascii() and part.isdigit() else (1 << 62, part) for part in parts if part], name
