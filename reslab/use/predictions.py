"""What `reslab predict` gives out, as it comes: tables, JSON, or a file that appears when it is whole. Memory does not grow."""

import csv
import json
import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from reslab.errors import CallError, shown
from reslab.interval import percent
from reslab.run import workplace
from reslab.use.classifier import Prediction

if TYPE_CHECKING:
    from rich.console import Console

Answers = Iterable[tuple[Path, Prediction | str]]

PAGE = 100  # rows of a table
COLUMNS = ("image", "label", "probability", "error")
KINDS = (".csv", ".jsonl")


def check_out(out: Path) -> None:
    """Raises CallError for a file that predictions cannot be written to; a device or pipe is not to be replaced."""
    if out.suffix.lower() not in KINDS or (out.exists() and not out.is_file()):
        raise CallError(f"--out must be a regular file that ends in {' or '.join(KINDS)}; received {shown(out)}")


def write_file(answers: Answers, out: Path) -> tuple[int, int]:
    """Writes a row an image and returns how many were written, and how many of them are errors.

    A .csv has the columns image, label, probability and error; a .jsonl the five likeliest classes too. The file gets its
    name when all are in it; a link stays a link. Raises CallError for another name, WorkError when it cannot be written.
    """
    check_out(out)
    out, kind = out.resolve(), out.suffix.lower()
    n = failed = 0
    with workplace(out) as folder:
        # File names need not be text; as surrogates they go back to the bytes that they were
        with (folder / "rows").open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            write = _csv(stream) if kind == ".csv" else lambda row: stream.write(json.dumps(row) + "\n")
            for path, found in answers:
                write(_row(path, found))
                n, failed = n + 1, failed + isinstance(found, str)
            stream.flush()
            os.fsync(stream.fileno())
        (folder / "rows").replace(out)
    return n, failed


def print_json(answers: Answers) -> int:
    """Prints a JSON list, a row a line, and returns how many are errors. What breaks off leaves the list open."""
    failed, before = 0, "["
    for path, found in answers:
        print(f"{before}\n{json.dumps(_row(path, found))}", end="", flush=True)
        failed, before = failed + isinstance(found, str), ","
    print("\n]")
    return failed


def print_tables(answers: Answers, console: "Console") -> int:
    """Prints tables of up to 100 images and returns how many are errors."""
    from rich.table import Table
    from rich.text import Text

    failed, rows = 0, iter(answers)
    while page := list(islice(rows, PAGE)):
        table = Table("image", "class", "probability", "next")
        for column in table.columns:
            column.overflow = "fold"
        for path, found in page:
            if isinstance(found, str):
                failed += 1
                table.add_row(Text(shown(path)), Text(found, style="red"), "", "")
            else:
                then = "  ".join(f"{shown(label)} {percent(p, space='')}" for label, p in found.top[1:3])
                table.add_row(Text(shown(path)), Text(shown(found.label)), percent(found.probability, space=""), Text(then))
        console.print(table)
    return failed


def _row(path: Path, found: Prediction | str) -> dict[str, Any]:
    return {"image": str(path), **({"error": found} if isinstance(found, str) else found._asdict())}


def _csv(stream: IO[str]) -> Callable[[dict[str, Any]], Any]:
    writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    return lambda row: writer.writerow(row | {"label": _writable(row.get("label", ""))})


def _writable(label: str) -> str:
    """The label; escaped where it holds what no file name does, half a character, which would end the file."""
    try:
        label.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return shown(label)
    return label
