"""Explained images -> one HTML page that needs no network, and a table for a terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reslab.errors import shown
from reslab.interval import percent
from reslab.run import write_whole
from reslab.use.explain import PLACED
from reslab.use.overlay import scale

if TYPE_CHECKING:
    from reslab.use.explained import Explanations

VERDICTS = {
    True: "the maps depend on the net",
    False: "the maps hardly depend on the net: read nothing about it from them",
    None: "of each pair one map is the same everywhere: choose an earlier stage with --at",
}


def write_sheet(found: "Explanations", run: str, sure: float) -> Path:
    """Writes sheet.html beside the overlays and returns its path. `sure` is the confidence below which the net is not.

    Names and labels come from outside and are escaped.
    """
    environment = Environment(loader=PackageLoader("reslab", "use"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": shown, "correlation": correlation, "percent": percent}
    page = environment.get_template("sheet.html.j2").render(found=found, run=run, sure=sure, scale=scale(), at_place=found.method in PLACED)
    target = found.out / "sheet.html"
    write_whole(target, page.encode("utf-8", "backslashreplace"))
    return target


def correlation(value: float | None) -> str:
    """As it is shown; a dash where there is none."""
    return "–" if value is None else f"{value:z.2f}"


def print_table(found: "Explanations", console: Console) -> None:
    """Each image with what was said of it, then the control and where the page is."""
    table = Table("image", "class", "probability", "map for", "rank correlation", "file")
    for column in table.columns:
        column.overflow = "fold"
    for one in found.explained:
        names = (Text(shown(text)) for text in (one.path, one.prediction.label))
        table.add_row(*names, percent(one.prediction.probability, space=""), Text(shown(one.label)), correlation(one.rank_correlation), one.file)
    for path, reason in found.failed.items():
        table.add_row(Text(shown(path)), Text(reason, style="red"))
    console.print(table)
    for one in found.explained:
        if one.neighbours:
            near = ", ".join(f"{shown(row['name'])} ({shown(row['label'])}, {row['similarity']:.3f})" for row in one.neighbours)
            print(f"nearest to {shown(one.path)}: {near}")
    if found.explained:
        print(f"sanity: rank correlation {correlation(found.rank_correlation)} with the maps of random weights; {VERDICTS[found.depends_on_weights]}")
        print(f"sheet: {shown(found.out / 'sheet.html')}")
