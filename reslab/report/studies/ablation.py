"""Errors by depth for each norm, with skips and without; what each part buys; which nets have trained at all."""

import math

from reslab.report.charts import Canvas, Drawn, canvas, colours, titled
from reslab.report.grids import Line, Panel, by_depth, losses
from reslab.report.svg import HEAT, MUTED, SERIES
from reslab.run import Record
from reslab.study.ablation import EFFECTS, NORMS, SKIPS, effects
from reslab.study.grid import depths, has_trained, results

COLOURS = colours(SKIPS)
EFFECT_TITLES = ("what skips buy", "what batch norm buys", "together, beyond apart")


def figures(records: list[Record]) -> list[Drawn]:
    """Training error, test error, effects, survival, and the losses of the deepest nets."""
    deep = depths(records)[-1]
    return [
        by_depth("Training error by depth, with skips and without, a dot a seed", records, _panels("train_error")),
        _effects(records),
        _survival(records),
        by_depth("Test error by depth, with skips and without, a dot a seed", records, _panels("test_error")),
        losses(f"Training loss by step at {deep} layers, a line a seed", records, {title: _lines(norm, layers=deep) for norm, title in NORMS.items()}),
    ]


def _panels(error: str) -> list[Panel]:
    return [Panel(title, error, _lines(norm)) for norm, title in NORMS.items()]


def _lines(norm: str, **facts: int) -> list[Line]:
    return [Line(skip, colour, {"skip": skip, "norm": norm, **facts}) for skip, colour in COLOURS.items()]


def _effects(records: list[Record]) -> Drawn:
    """A point a depth, with its 95 % interval over seeds."""
    found = {depth: effects(records, depth) for depth in depths(records)}
    drawn = []
    with canvas(3, 2.8) as c:
        for axes, name, title in zip(c.axes, EFFECTS, EFFECT_TITLES, strict=True):
            axes.axhline(0, color=MUTED, linewidth=0.8)
            for x, (depth, each) in enumerate(found.items()):
                e = each[name]
                drawn.append({"effect": name, "layers": depth, "points": 100 * e.mean, "low": 100 * e.low, "high": 100 * e.high, "n": e.n})
                if e.n:
                    width = 100 * (e.high - e.mean) if e.has_interval else None
                    fill = SERIES[2] if e.has_interval else "none"
                    axes.errorbar(x, 100 * e.mean, yerr=width, color=SERIES[2], markerfacecolor=fill, marker="o", markersize=5, capsize=4)
                    axes.annotate(
                        f"{100 * e.mean:+.0f}", (x, 100 * e.mean), xytext=(7, 0), textcoords="offset points", color=SERIES[2], fontsize=9, va="center"
                    )
            axes.set_xticks(range(len(found)), [str(depth) for depth in found])
            axes.set_xlim(-0.4, len(found) - 0.3)
            axes.set_ylim(-110, 110)  # intervals of two seeds may leave it: no effect can
            titled(axes, title, "layers", "points of training error" if axes is c.axes[0] else "")
        return c.drawn("What each part takes off the training error, with 95 % intervals over seeds (hollow: too few for one)", drawn)


def _survival(records: list[Record]) -> Drawn:
    """Per kind of net and depth, how many seeds have trained at all."""
    columns, nets = depths(records), results(records)
    kinds = [(skip, norm) for skip in SKIPS for norm in NORMS]
    cells = [[[has_trained(r) for r in nets if (r["skip"], r["norm"], r["layers"]) == (*kind, depth)] for depth in columns] for kind in kinds]
    with canvas(1, 2.6, grid=False) as c:
        _map(c, cells)
        c.axes[0].set_xticks(range(len(columns)), [str(depth) for depth in columns])
        c.axes[0].set_yticks(range(len(kinds)), [f"{skip}, {NORMS[norm]}" for skip, norm in kinds])
        titled(c.axes[0], "seeds that trained at all: ten points better than guessing", "layers")
        drawn = [
            {"skip": skip, "norm": norm, "layers": depth, "trained": sum(seeds), "n": len(seeds)}
            for (skip, norm), line in zip(kinds, cells, strict=True)
            for depth, seeds in zip(columns, line, strict=True)
        ]
        return c.drawn("Nets that trained at all", drawn)


def _map(c: Canvas, cells: list[list[list[bool]]]) -> None:
    axes = c.axes[0]
    axes.imshow([[sum(s) / len(s) if s else math.nan for s in line] for line in cells], cmap=HEAT, vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(cells):
        for x, seeds in enumerate(line):
            dark = bool(seeds) and sum(seeds) / len(seeds) < 0.5
            axes.text(x, y, f"{sum(seeds)} of {len(seeds)}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.spines[:].set_visible(False)
