"""Figures of grids of trained nets: errors by depth, errors by variant beside the published ones, running losses."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from reslab.report.charts import Drawn, canvas, titled, with_seeds
from reslab.report.svg import MUTED, SERIES
from reslab.run import Record
from reslab.study.grid import results
from reslab.study.table import best

OURS, PUBLISHED = SERIES[0], SERIES[4]
TOP = 4.0  # of the axis of losses, at least: what is above is drawn at its edge
HEADROOM = 1.2  # above the loss that nets of many classes begin with


class Line(NamedTuple):
    """The nets of a line: those of which the facts hold."""

    label: str
    colour: str
    facts: Mapping[str, Any]


class Panel(NamedTuple):
    """What a panel shows of each net, and its lines."""

    title: str
    error: str
    lines: Sequence[Line]


def by_depth(title: str, records: list[Record], panels: Sequence[Panel]) -> Drawn:
    """Errors against depth, every seed a dot, means joined; a dotted line is the error of a guess."""
    nets = results(records)
    depths = sorted({r["layers"] for r in nets})
    with canvas(len(panels), 3.4) as c:
        for axes, panel in zip(c.axes, panels, strict=True):
            axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
            axes.set_xlim(-0.2, len(depths) - 0.45)
            axes.set_ylim(0, 100)
            _guess(axes, nets, len(depths) - 1, first=axes is c.axes[0])
            for line in panel.lines:
                found = [r for r in nets if all(r[key] == value for key, value in line.facts.items())]
                with_seeds(c, axes, range(len(depths)), [[100 * r[panel.error] for r in found if r["layers"] == d] for d in depths], line.colour, line.label)
            says = axes is c.axes[0] or panel.error != panels[0].error
            titled(axes, panel.title, "layers", f"{'training' if panel.error == 'train_error' else 'test'} error, %" if says else "")
        facts = dict.fromkeys(key for panel in panels for line in panel.lines for key in line.facts)
        return c.drawn(title, rows(nets, *facts))


def rows(nets: list[Record], *facts: str) -> list[Record]:
    """The numbers behind figures of errors."""
    return [{key: r[key] for key in (*facts, "layers", "seed", "train_error", "test_error", "lost", "steps", "parameters")} for r in nets]


def _guess(axes: Axes, nets: list[Record], last: int, first: bool) -> None:
    guess = 100 * max(r["guess_error"] for r in nets)
    axes.plot((-0.2, last), (guess, guess), color=MUTED, linewidth=0.8, linestyle=":")  # no further: names come there
    if first:
        axes.annotate("guessing", (0, guess), xytext=(-2, 3), textcoords="offset points", color=MUTED, fontsize=8)


def by_variant(title: str, records: list[Record]) -> Drawn:
    """A row a variant: training and test error, every seed a dot and the mean a bar, beside the published error."""
    nets = results(records)
    names = list(dict.fromkeys(r["variant"] for r in nets))
    most = 100 * max(max(r["train_error"], r["test_error"]) for r in nets)
    with canvas(3, 0.9 + 0.36 * len(names), share=False) as c:
        for axes, key, colour in zip(c.axes, ("train_error", "test_error", "published"), (OURS, OURS, PUBLISHED), strict=True):
            for y, name in enumerate(names):
                values = [100 * r[key] for r in nets if r["variant"] == name]
                axes.plot([0, sum(values) / len(values)], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
                axes.scatter(values, [y] * len(values), color=colour, s=16, linewidths=0, marker=">" if key == "published" and _least(nets, name) else "o")
            axes.set_yticks(range(len(names)), [_named(nets, name) if axes is c.axes[0] else "" for name in names])
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_xlim(0, None if key == "published" else 1.05 * most)
            axes.grid(axis="y", visible=False)
        for axes, name in zip(c.axes, ("training error, %", "test error, %", "published test error, %"), strict=True):
            titled(axes, name)
        return c.drawn(
            title, [{**row, "published_error": r["published"], "rate": r.get("rate", "")} for row, r in zip(rows(nets, "variant"), nets, strict=True)]
        )


def _named(nets: list[Record], variant: str) -> str:
    """A variant, and its rate where it had a choice."""
    return next(f"{variant}, rate {r['rate']}" if "rate" in r else variant for r in nets if r["variant"] == variant)


def _least(nets: list[Record], name: str) -> bool:
    return any(r["published_is_least"] for r in nets if r["variant"] == name)


def losses(title: str, records: list[Record], panels: Mapping[str, Sequence[Line]], reference: Line | None = None) -> Drawn:
    """Running training loss by step, a panel each, a line a seed; `reference` is drawn behind every panel, in grey."""
    curves = [r for r in records if r["kind"] == "curve"]
    top = max(TOP, HEADROOM * min((loss for r in curves for loss in r["loss"][:1] if loss is not None), default=0.0))
    with canvas(len(panels), 2.7) as c:
        for axes, (name, lines) in zip(c.axes, panels.items(), strict=True):
            axes.set_ylim(0, top)
            for line in [reference] if reference else []:
                _curves(axes, curves, line, top, alpha=0.5)
            for line in lines:
                end = _curves(axes, curves, line, top)
                if end and len(lines) > 1:
                    c.at_end(axes, *end, line.label, line.colour)
            titled(axes, name, "step")
            axes.title.set_fontsize(9)
        keys = dict.fromkeys(key for lines in panels.values() for line in lines for key in line.facts if key != "layers")
        shared = [
            {**{key: r[key] for key in (*keys, "layers", "seed")}, "step": r["every"] * i, "loss": loss} for r in curves for i, loss in enumerate(r["loss"])
        ]
        return c.drawn(title, shared)


def _curves(axes: Axes, curves: list[Record], line: Line, top: float, alpha: float = 0.9) -> tuple[float, float] | None:
    """Draws the losses of the nets of a line, a cross where one was lost; gives back where the last one ends."""
    end = None
    for row in (r for r in curves if all(r[key] == value for key, value in line.facts.items())):
        kept = list(itertools.takewhile(lambda loss: loss is not None, row["loss"]))
        points = [(row["every"] * (i + 0.5), min(loss, top)) for i, loss in enumerate(kept)]
        axes.plot([x for x, _ in points], [y for _, y in points], color=line.colour, linewidth=1, alpha=alpha, clip_on=False)
        if len(kept) < len(row["loss"]) and points:
            axes.plot(*points[-1], color=line.colour, marker="x", clip_on=False)
        end = points[-1] if points else end
    return end


def variants(records: list[Record], table: Sequence[str], what: str) -> list[Drawn]:
    """The figures of a study that repeats a table, in its order: errors beside the published ones, and losses beside those of its first row."""
    records = sorted(best(records), key=lambda r: table.index(r["variant"]))
    nets = results(records)
    names, depth = list(dict.fromkeys(r["variant"] for r in nets)), nets[0]["layers"]
    panels = {name.replace(", ", ",\n"): [Line(name, OURS, {"variant": name})] for name in names}
    return [
        by_variant(f"Error by {what} at {depth} layers, a dot a seed, beside the published ones", records),
        losses(f"Training loss by step, a line a seed; {table[0]} in grey", records, panels, Line(table[0], MUTED, {"variant": table[0]})),
    ]
