"""What the figures of studies have in common: a figure with its numbers, small multiples, labels at the end of lines."""

import base64
import csv
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, MaxNLocator

from reslab.report.svg import HEAT, SERIES, STYLE, as_svg

Row = dict[str, Any]
COUNTED = ("block", "blocks removed", "convolutions", "layer", "layers", "step")  # axes with no half of a tick


class Drawn(NamedTuple):
    """A figure and the numbers it shows."""

    title: str
    svg: str
    rows: list[Row]

    @property
    def csv(self) -> bytes:
        """The numbers as a table with a header."""
        held = io.StringIO()
        writer = csv.DictWriter(held, list(self.rows[0]) if self.rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return held.getvalue().encode("utf-8", "backslashreplace")

    @property
    def link(self) -> str:
        """The numbers as a link that a browser saves as a file."""
        return f"data:text/csv;base64,{base64.b64encode(self.csv).decode()}"


def caption(text: str, rows: list[Row], most: int) -> str:
    """A figure's title with how many test images it is of and, where its panels are the first nets of more, of how many."""
    nets, images = len({r["net"] for r in rows}), sorted({r["images"] for r in rows if "images" in r})
    text += f"; {' or '.join(f'{n:,}' for n in images)} test images" if images else ""
    return text + (f"; the first {most} of {nets} nets" if nets > most else "")


class Canvas:
    """Panels side by side on the same axes; `drawn` ends it: it names the lines, as the axes then have their limits."""

    def __init__(self, panels: int, height: float, share: bool, **options: Any) -> None:
        self.figure = Figure(figsize=(9.6, height), layout="constrained")
        self.axes: list[Axes] = list(self.figure.subplots(1, panels, squeeze=False, **{"sharex": share, "sharey": share, **options})[0])
        self.ends: dict[Axes, list[tuple[float, float, str, str]]] = {}
        self.least = 0.24 / height  # of two names: a line of text, as a part of a panel that leaves room for titles and ticks

    def at_end(self, axes: Axes, x: float, y: float, label: str, colour: str) -> None:
        """A name right of a line's last point, in the line's colour. None where the line has no end."""
        if math.isfinite(y):
            self.ends.setdefault(axes, []).append((x, y, label, colour))

    def drawn(self, title: str, rows: list[Row]) -> Drawn:
        for axes, ends in self.ends.items():
            at_ends(axes, max(x for x, *_ in ends), [(y, label, colour) for _, y, label, colour in ends], self.least)
        return Drawn(title, as_svg(self.figure, title), rows)


@contextmanager
def canvas(panels: int = 1, height: float = 3.0, share: bool = True, grid: bool = True, **options: Any) -> Iterator[Canvas]:
    """A figure in the style of the page."""
    with matplotlib.rc_context(STYLE | {"axes.grid": grid}):
        yield Canvas(panels, height, share, **options)


def titled(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    """The panel's title and what its axes are."""
    axes.set_title(as_typed(title), loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x in COUNTED and isinstance(axes.xaxis.get_major_locator(), AutoLocator):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def as_typed(name: str) -> str:
    """A name, such as a folder's, for matplotlib to draw: dollars would make a formula of it, and bytes that are no text an error."""
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")


def with_seeds(c: Canvas, axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """A line through the means, every seed a dot, and the name at the line's end. Where no seed was measured the line is broken."""
    for at, seeds in zip(x, values, strict=True):
        axes.scatter([at] * len(seeds), seeds, color=colour, s=14, alpha=0.6, linewidths=0)
    means = [sum(seeds) / len(seeds) if seeds else math.nan for seeds in values]
    axes.plot(x, means, color=colour)
    for at, mean in [(at, mean) for at, mean in zip(x, means, strict=True) if math.isfinite(mean)][-1:]:
        c.at_end(axes, at, mean, label, colour)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, in order; at most as many as can be told apart."""
    return dict(zip(names, SERIES, strict=False))


def at_ends(axes: Axes, x: float, labels: Sequence[tuple[float, str, str]], least: float) -> None:
    """Names (y, text, colour) right of the last points of lines, moved apart where they would overlap.

    Call it when the y axis, linear or logarithmic, has its limits; `least` is the distance of two names as a part of the axis.
    """
    axes.get_ylim()  # transforms alone do not notice what was drawn last
    placed: list[float] = []
    ordered = sorted(labels)
    for y, _, _ in ordered:
        height = float((axes.transData + axes.transAxes.inverted()).transform((x, y))[1])
        placed.append(max(height, placed[-1] + least if placed else 0.0))
    over = max(0.0, (placed[-1] if placed else 0.0) - 1)
    for i in reversed(range(len(placed))):  # what stuck out above pushes the rest down
        placed[i] = min(placed[i], 1 - least * (len(placed) - 1 - i)) if over else placed[i]
    for at, (_, text, colour) in zip(placed, ordered, strict=True):
        axes.annotate(text, (x, at), (6, 0), axes.get_xaxis_transform(), "offset points", color=colour, fontsize=9, va="center", annotation_clip=False)


def heat(axes: Axes, values: Sequence[Sequence[float]], low: float, high: float) -> Any:
    """A map of rows, the first at the bottom, on a common colour scale; what is missing (NaN) stays empty."""
    return axes.imshow(values, cmap=HEAT, vmin=low, vmax=high, aspect="auto", origin="lower", interpolation="nearest")


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis, its ticks in plain numbers where they are short. Call it when the lines are drawn."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    narrow = high < 300 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=6 if narrow else 7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e4 else f"1e{round(math.log10(value))}"))
    axes.minorticks_off()
