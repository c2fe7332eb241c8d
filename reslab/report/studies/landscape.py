"""The surface as contours and in perspective, the loss along lines, and both ends of the Hessian's spectrum: Li et al. 2018."""

import math
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from reslab.report.charts import Drawn, as_typed, canvas, colours, titled
from reslab.report.svg import HEAT, INK, MUTED
from reslab.run import Record

Plane = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]  # first distances, second distances, log10 loss
LEVELS = 24
READABLE = 0.6  # of the colour scale, below which white is read on it, and above it black
TICKS = (-1, -0.5, 0, 0.5, 1)
TURN, TILT = -60, 35  # degrees: where the perspective is seen from
SHARP: dict[Any, Any] = {"savefig.dpi": 160}  # of what is drawn in pixels


def figures(records: list[Record]) -> list[Drawn]:
    """Whatever can be drawn of the rows, lines and spectra that are there."""
    of = {kind: [r for r in records if r["kind"] == kind] for kind in ("row", "line", "hessian")}
    test = {r["net"]: f"{r['net']}, test error {100 * r['test_error']:.1f} %" for r in records if r["kind"] == "errors"}
    drawn = [_contours(of["row"], test), _perspective(of["row"])] if _planes(of["row"]) else []
    return drawn + [draw(of[kind]) for kind, draw in (("line", _lines), ("hessian", _spectra)) if of[kind]]


def _planes(rows: list[Record]) -> dict[str, Plane]:
    """Of every net that has two rows or more: a missing row is left out, the loss is interpolated there."""
    found = {}
    for net in dict.fromkeys(r["net"] for r in rows):
        mine = sorted((r for r in rows if r["net"] == net), key=lambda r: r["number"])
        if len(mine) > 1:
            loss = np.array([[math.nan if v is None else v for v in r["loss"]] for r in mine])
            found[net] = np.array(mine[0]["at"]), np.array([r["at"][r["number"]] for r in mine]), np.log10(np.maximum(loss, 1e-12))
    return found


def _scale(planes: dict[str, Plane]) -> tuple[float, float]:
    """The lowest and the highest logarithm of the loss on all planes."""
    heights = np.concatenate([z[np.isfinite(z)] for *_, z in planes.values()])
    low, high = (float(heights.min()), float(heights.max())) if len(heights) else (0.0, 1.0)
    return low, max(high, low + 1e-6)


def _contours(rows: list[Record], titles: dict[str, str]) -> Drawn:
    planes = _planes(rows)
    low, high = _scale(planes)
    with canvas(len(planes), 4.3, grid=False, subplot_kw={"aspect": "equal"}) as c:
        for axes, (net, (x, y, z)) in zip(c.axes, planes.items(), strict=True):
            heights = np.ma.masked_invalid(z)
            axes.contourf(x, y, heights, levels=np.linspace(low, high, LEVELS), cmap=HEAT, vmin=low, vmax=high)
            inks = ["white" if v < low + READABLE * (high - low) else "black" for v in _marks(low, high)] or "white"
            lines = axes.contour(x, y, heights, levels=_marks(low, high), colors=inks, linewidths=0.7, linestyles="solid")
            axes.clabel(lines, fmt=_loss, fontsize=7)
            axes.plot(0, 0, marker="+", color="white", markersize=7)
            axes.set_xticks(TICKS)
            axes.set_yticks(TICKS)
            titled(axes, titles.get(net, net), "first direction", "second direction" if axes is c.axes[0] else "")
        colours_of = ScalarMappable(Normalize(low, high), HEAT)
        bar = c.figure.colorbar(colours_of, ax=c.axes, shrink=0.8, ticks=_marks(low, high), format=lambda v, _: _loss(v), label="loss")
        bar.outline.set_visible(False)
        return c.drawn("Loss on a plane through the trained weights (+), one colour scale for all nets", _table(rows))


def _perspective(rows: list[Record]) -> Drawn:
    planes = _planes(rows)
    low, high = _scale(planes)
    with matplotlib.rc_context(SHARP), canvas(len(planes), 4.4, share=False, grid=False, subplot_kw={"projection": "3d"}) as c:
        for axes, (net, (x, y, z)) in zip(c.axes, planes.items(), strict=True):
            surface: Any = axes  # mplot3d
            heights = np.where(np.isfinite(z), z, high)  # what is lost stands at the ceiling
            style = {"cmap": HEAT, "vmin": low, "vmax": high, "linewidth": 0.15, "edgecolor": "#00000040"}
            surface.plot_surface(*np.meshgrid(x, y), heights, rcount=len(y), ccount=len(x), rasterized=True, **style)
            surface.view_init(TILT, TURN)
            surface.set_zlim(low, high)
            surface.set_zticks(_marks(low, high), [_loss(v) for v in _marks(low, high)])
            for axis in (surface.xaxis, surface.yaxis, surface.zaxis):
                axis.set_pane_color((0, 0, 0, 0))
            surface.set_xticks(TICKS[::2])
            surface.set_yticks(TICKS[::2])
            titled(axes, net)
        return c.drawn("The same surface in perspective, height and colour the logarithm of the loss", _table(rows))


def _marks(low: float, high: float) -> list[float]:
    """Exponents of the powers of ten within the scale, at most eight; where there are less than two, of round numbers beside them."""
    first, last = math.ceil(low), math.floor(high)
    powers = [float(v) for v in range(first, last + 1, max(1, -(-(last - first + 1) // 8)))]
    if len(powers) > 1:
        return powers
    between = [math.log10(v) for v in MaxNLocator(5, steps=(1, 2, 5, 10)).tick_values(10**low, 10**high) if v > 0]
    return sorted({*powers, *(v for v in between if low <= v <= high)})


def _loss(exponent: float) -> str:
    return f"{10**exponent:g}"


def _panels(records: list[Record], height: float, draw: Callable[[Axes, str, list[Record]], None], title: str, rows: list[Record]) -> Drawn:
    nets = list(dict.fromkeys(r["net"] for r in records))
    with canvas(len(nets), height) as c:
        for axes, net in zip(c.axes, nets, strict=True):
            draw(axes, net, [r for r in records if r["net"] == net])
        return c.drawn(title, rows)


def _lines(lines: list[Record]) -> Drawn:
    nets = list(dict.fromkeys(r["net"] for r in lines))
    colour = colours([str(n) for n in sorted({r["number"] for r in lines})])

    def draw(axes: Axes, net: str, mine: list[Record]) -> None:
        for r in mine:
            axes.plot(r["at"], [math.nan if v is None else v for v in r["loss"]], color=colour.get(str(r["number"]), MUTED), linewidth=1.3)
        guess = math.log(mine[0]["classes"])
        axes.axhline(guess, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate("guessing", (0, guess), xytext=(0, 3), textcoords="offset points", color=INK, fontsize=8, ha="center")
        axes.set_yscale("log")
        titled(axes, net, "distance, in lengths of the filters", "loss" if net == nets[0] else "")

    rows = [{"net": r["net"], "direction": r["number"], "distance": a, "loss": v} for r in lines for a, v in zip(r["at"], r["loss"], strict=True)]
    return _panels(lines, 3.2, draw, "Loss along random directions, a line each", rows)


def _spectra(found: list[Record]) -> Drawn:
    nets = list(dict.fromkeys(r["net"] for r in found))
    with canvas(1, 0.9 + 0.6 * len(nets)) as c:
        axes, colour = c.axes[0], colours(nets[:5])
        for place, net in enumerate(nets):
            for r in (r for r in found if r["net"] == net):
                values = [*r["largest"], *r["smallest"]]
                axes.scatter(values, [place + 0.12 * (r["number"] - 1)] * len(values), color=colour.get(net, MUTED), s=16, alpha=0.7, linewidths=0)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_yticks(range(len(nets)), [as_typed(net) for net in nets])
        axes.set_ylim(len(nets) - 0.5, -0.5)
        axes.axvline(0, color=MUTED, linewidth=0.6)
        titled(axes, "", "eigenvalue")
        rows = [
            {"net": r["net"], "sample": r["number"], "end": end, "eigenvalue": v, "within": e}
            for r in found
            for end in ("largest", "smallest")
            for v, e in zip(r[end], r[f"{end}_within"], strict=True)
        ]
        return c.drawn("Both ends of the Hessian's spectrum, a row of dots a sample of images", rows)


def _table(rows: list[Record]) -> list[Record]:
    return [
        {"net": r["net"], "first": a, "second": r["at"][r["number"]], "loss": v}
        for r in sorted(rows, key=lambda r: (r["net"], r["number"]))
        for a, v in zip(r["at"], r["loss"], strict=True)
    ]
