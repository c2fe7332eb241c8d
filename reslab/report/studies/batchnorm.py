"""Training loss, and what the loss does along its gradient, through training: Santurkar et al. 2018, figures 2 and 4."""

from statistics import median

from reslab.report.charts import Drawn, canvas, colours, logarithmic, titled
from reslab.report.svg import MUTED
from reslab.run import Record

NORMS = {"batch": "batch norm", "none": "no norm", "noisy": "noisy batch norm"}
COLOURS = colours(list(NORMS))


def figures(records: list[Record]) -> list[Drawn]:
    """The training loss; the loss's range, the gradient's change and the smoothness at each probe; how much inputs move."""
    probes = [r for r in records if r["kind"] == "probe"]
    drawn = [_losses([r for r in records if r["kind"] == "curve"])]
    drawn += [_probed(probes, *told) for told in PROBED]
    return [*drawn, _drift([r for r in records if r["kind"] == "speed"])]


PROBED = (
    ("Range of the loss along the gradient of a step", "highest minus lowest loss", "range"),
    ("Change of the gradient along itself, at most", "2-norm of the difference", "change"),
    ("Effective smoothness: change of the gradient for the way gone, at most", "change / distance", "smoothness"),
)


def _shapes(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(r["shape"] for r in records))


def _losses(curves: list[Record]) -> Drawn:
    shapes = _shapes(curves)
    with canvas(max(1, len(shapes)), 3.2) as c:
        for axes, shape in zip(c.axes, shapes, strict=False):
            for norm, colour in COLOURS.items():
                lines = [points for r in curves if (r["shape"], r["norm"]) == (shape, norm) and all(points := _points(r))]
                for points in lines:
                    axes.plot(*points, color=colour, linewidth=1, alpha=0.8)
                if lines:
                    c.at_end(axes, max(x[-1] for x, _ in lines), median(y[-1] for _, y in lines), NORMS[norm], colour)
            titled(axes, shape, "step", "training loss" if shape == shapes[0] else "")
        rows = [
            {"shape": r["shape"], "norm": r["norm"], "seed": r["seed"], "step": step, "loss": loss}
            for r in curves
            for step, loss in zip(*_points(r), strict=True)
        ]
        return c.drawn("Training loss by step, a line a seed", rows)


def _points(curve: Record) -> tuple[list[float], list[float]]:
    """Steps and losses of a curve; a lost one is drawn as far as it went."""
    kept = [(curve["every"] * (i + 0.5), loss) for i, loss in enumerate(curve["loss"]) if loss is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def _probed(probes: list[Record], title: str, unit: str, key: str) -> Drawn:
    shapes = _shapes(probes)
    with canvas(max(1, len(shapes)), 3.2) as c:
        for axes, shape in zip(c.axes, shapes, strict=False):
            for norm, colour in COLOURS.items():
                mine = [r for r in probes if (r["shape"], r["norm"]) == (shape, norm)]
                steps = sorted({r["step"] for r in mine})
                at = [[v for r in mine if r["step"] == step and (v := r[key] or 0.0) > 0] for step in steps]
                steps, at = [s for s, v in zip(steps, at, strict=True) if v], [v for v in at if v]
                if at:
                    axes.fill_between(steps, [min(v) for v in at], [max(v) for v in at], color=colour, alpha=0.18, linewidth=0)
                    axes.plot(steps, [median(v) for v in at], color=colour, linewidth=1.4)
                    c.at_end(axes, steps[-1], median(at[-1]), NORMS[norm], colour)
            logarithmic(axes)
            titled(axes, shape, "step", unit if shape == shapes[0] else "")
        rows = [{"shape": r["shape"], "norm": r["norm"], "seed": r["seed"], "step": r["step"], key: r[key]} for r in probes]
        lost = sum(r[key] is None for r in probes)
        return c.drawn(f"{title}: median and range over seeds" + (f"; {lost} infinite values are beyond it" if lost else ""), rows)


def _drift(speeds: list[Record]) -> Drawn:
    shapes = _shapes(speeds)
    with canvas(max(1, len(shapes)), 2.6) as c:
        for axes, shape in zip(c.axes, shapes, strict=False):
            for place, (norm, colour) in enumerate(COLOURS.items()):
                found = [r["drift"] for r in speeds if (r["shape"], r["norm"]) == (shape, norm) and r["drift"] is not None]
                axes.scatter([place] * len(found), found, color=colour, s=22, alpha=0.7, linewidths=0)
            axes.set_xticks(range(len(NORMS)), list(NORMS.values()))
            axes.set_xlim(-0.5, len(NORMS) - 0.5)
            axes.set_ylim(bottom=0)
            axes.axhline(0, color=MUTED, linewidth=0.5)
            titled(axes, shape, "", "change, in deviations" if shape == shapes[0] else "")
        rows = [{key: r[key] for key in ("shape", "norm", "seed", "drift", "mean_loss")} for r in speeds]
        return c.drawn("How much a layer's inputs move from one step to the next, a dot a seed", rows)
