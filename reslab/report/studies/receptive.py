"""Size against depth, and maps of what a unit in the middle uses: Luo et al. 2016."""

from statistics import fmean
from typing import Any

from reslab.report.charts import Drawn, Row, canvas, colours, heat, titled, with_seeds
from reslab.report.svg import MUTED
from reslab.run import Record

TWINS = colours(["residual", "plain"])
FIELDS = (("plain", False), ("plain", True), ("residual", False), ("residual", True))
Map = list[list[float]]


def figures(records: list[Record]) -> list[Drawn]:
    """Sizes of the stacks and of the twins, then the twins' maps."""
    stacks, twins = ([r for r in records if r["look"] == look and r["size"]] for look in ("stack", "twin"))
    return [*([_stacks(stacks)] if stacks else []), *([_sizes(twins), _maps(twins)] if twins else [])]


def _stacks(stacks: list[Record]) -> Drawn:
    depths = sorted({r["layers"] for r in stacks})
    fields = [next(r["theoretical"] for r in stacks if r["layers"] == depth) for depth in depths]
    values = [[r["size"] for r in stacks if r["layers"] == depth] for depth in depths]
    with canvas(1, 3.2) as c:
        axes = c.axes[0]
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.plot(depths, fields, color=MUTED)
        c.at_end(axes, depths[-1], fields[-1], "theoretical", MUTED)
        with_seeds(c, axes, depths, values, TWINS["residual"], "effective")
        middle = fmean(values[0])
        root = [middle * (depth / depths[0]) ** 0.5 for depth in depths]
        beside = max(0, len(depths) - 2)
        axes.plot(depths, root, color=MUTED, linestyle=":")
        axes.annotate("square root of the depth", (depths[beside], root[beside]), xytext=(0, -16), textcoords="offset points", color=MUTED, fontsize=9)
        _ticks(axes, depths, sorted({5, 10, 20, 40, 80}))
        titled(axes, "stacks of 3x3 convolutions and ReLU", "convolutions", "pixels a side")
        rows = [{key: r[key] for key in ("layers", "seed", "theoretical", "size", "spread")} for r in stacks]
        return c.drawn("Effective and theoretical receptive field by depth, at the start, a dot a seed", rows)


def _sizes(twins: list[Record]) -> Drawn:
    with canvas(2, 2.8) as c:
        for axes, twin in zip(c.axes, TWINS, strict=True):
            found = [[r["size"] for r in twins if (r["twin"], r["trained"]) == (twin, after)] for after in (False, True)]
            if all(found):
                with_seeds(c, axes, (0, 1), found, TWINS[twin], twin)
                field = next(r["theoretical"] for r in twins if r["twin"] == twin)
                axes.axhline(field, color=MUTED, linestyle=":")
                axes.annotate(f"theoretical, {field}", (0.5, field), xytext=(0, -12), textcoords="offset points", color=MUTED, fontsize=9, ha="center")
            axes.set_xticks((0, 1), ["before training", "after"])
            axes.set_xlim(-0.3, 1.5)
            axes.set_ylim(bottom=0)
            titled(axes, f"{twin} net", "", "pixels a side" if axes is c.axes[0] else "")
        rows = [{key: r[key] for key in ("twin", "trained", "pair", "theoretical", "size", "spread", "steps")} for r in twins]
        return c.drawn("Size of the effective field before and after training, a dot a net", rows)


def _maps(twins: list[Record]) -> Drawn:
    found = {(twin, after): [r["map"] for r in twins if (r["twin"], r["trained"]) == (twin, after)] for twin, after in FIELDS}
    means = {net: _mean(maps) for net, maps in found.items() if maps}
    rows: list[Row] = []
    with canvas(len(means), 2.8, share=False, grid=False) as c:
        for axes, ((twin, after), values) in zip(c.axes, means.items(), strict=True):
            picture = heat(axes, values, 0.0, 1.0)
            axes.set_aspect("equal")
            half = len(values) // 2
            axes.set_xticks((0, half, 2 * half), [str(-half), "0", str(half)])
            axes.set_yticks((0, half, 2 * half), [str(-half), "0", str(half)])
            titled(axes, f"{twin}, {'trained' if after else 'start'}", "pixels from the middle")
            rows += [{"twin": twin, "trained": after, "pixel": i - half, "across": across, "down": values[i][half]} for i, across in enumerate(values[half])]
        bar = c.figure.colorbar(picture, ax=c.axes, shrink=0.7, pad=0.01)
        bar.set_label("gradient, of the largest")
        return c.drawn("From where the middle unit is moved, mean over nets; the numbers are the lines through the middle", rows)


def _mean(maps: list[Map]) -> Map:
    return [[fmean(pixel) for pixel in zip(*rows, strict=True)] for rows in zip(*maps, strict=True)]


def _ticks(axes: Any, x: list[int], y: list[int]) -> None:
    axes.set_xticks(x, [str(value) for value in x])
    axes.set_yticks(y, [str(value) for value in y])
    axes.minorticks_off()
