"""Error by block removed, by number removed, by disorder, and the gradient by path length: Veit et al. 2016."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from reslab.report.charts import Drawn, Row, canvas, caption, colours, titled
from reslab.report.svg import MUTED
from reslab.run import Record

COLOURS = colours(["residual", "plain"])
MOST_NETS = 4  # panels side by side: of more nets, the first


def figures(records: list[Record]) -> list[Drawn]:
    """What was measured of these; every panel is a net, and its own error is a line."""
    parts = (_by_block(records), _by_number(records), _by_disorder(records), _by_length(records), _shares(records))
    return [drawn for part in parts for drawn in part]


def _nets(rows: list[Record]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["net"], r["twin"]) for r in rows))[:MOST_NETS]


def _whole(records: list[Record], like: Record) -> float:
    return 100 * float(next(r["error"] for r in records if r["kind"] == "whole" and r["cell"] == like["cell"]))


def _line_of_whole(axes: Axes, error: float) -> None:
    axes.axhline(error, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 104)


def _by_block(records: list[Record]) -> list[Drawn]:
    found = [r for r in records if r["kind"] == "removed"]
    if not found:
        return []
    nets = _nets(found)
    with canvas(len(nets), 3.2) as c:
        for axes, (net, twin) in zip(c.axes, nets, strict=True):
            rows = [r for r in found if r["net"] == net]
            axes.plot([r["number"] + 1 for r in rows], [100 * r["error"] for r in rows], color=COLOURS[twin], linewidth=1)
            for keeps, fill in ((True, COLOURS[twin]), (False, "none")):
                some = [r for r in rows if r["keeps_shape"] is keeps]
                axes.scatter([r["number"] + 1 for r in some], [100 * r["error"] for r in some], s=26, facecolors=fill, edgecolors=COLOURS[twin], zorder=3)
            _line_of_whole(axes, _whole(records, rows[0]))
            titled(axes, f"{net}: error without a block, %", "block (hollow: it changes the shape)")
        keys = ("net", "block", "number", "keeps_shape", "error", "rise", "rise_low", "rise_high", "images")
        return [c.drawn(caption("Test error when one block is removed; dashed: the whole net", found, MOST_NETS), _rows(found, keys))]


def _by_number(records: list[Record]) -> list[Drawn]:
    found = [r for r in records if r["kind"] == "several"]
    if not found:
        return []
    nets = _nets(found)
    with canvas(len(nets), 3.0) as c:
        for axes, (net, twin) in zip(c.axes, nets, strict=True):
            rows = [r for r in found if r["net"] == net]
            counts = sorted({r["removed"] for r in rows})
            axes.scatter([r["removed"] for r in rows], [100 * r["error"] for r in rows], color=COLOURS[twin], s=14, alpha=0.5, linewidths=0)
            whole = _whole(records, rows[0])
            means = [100 * _mean([r["error"] for r in rows if r["removed"] == count]) for count in counts]
            axes.plot([0, *counts], [whole, *means], color=COLOURS[twin])
            _line_of_whole(axes, whole)
            titled(axes, f"{net}: error, %", "blocks removed")
        return [
            c.drawn(
                caption("Test error by the number of removed blocks, a dot a draw", found, MOST_NETS),
                _rows(found, ("net", "draw", "removed", "error", "images")),
            )
        ]


def _by_disorder(records: list[Record]) -> list[Drawn]:
    found = [r for r in records if r["kind"] == "permuted"]
    if not found:
        return []
    nets = _nets(found)
    with canvas(len(nets), 3.0) as c:
        for axes, (net, twin) in zip(c.axes, nets, strict=True):
            rows = [r for r in found if r["net"] == net]
            axes.scatter([r["tau"] for r in rows], [100 * r["error"] for r in rows], color=COLOURS[twin], s=18, alpha=0.7, linewidths=0)
            _line_of_whole(axes, _whole(records, rows[0]))
            titled(axes, f"{net}: error, %", "Kendall's tau of the order (1: as trained)")
        c.axes[0].invert_xaxis()  # more disorder to the right; the panels share it
        return [
            c.drawn(
                caption("Test error by the disorder of the blocks, a dot a permutation", found, MOST_NETS),
                _rows(found, ("net", "draw", "tau", "error", "images")),
            )
        ]


def _by_length(records: list[Record]) -> list[Drawn]:
    found = [r for r in records if r["kind"] == "path"]
    if not found:
        return []
    nets = _nets(found)
    with canvas(len(nets), 3.0) as c:
        for axes, (net, twin) in zip(c.axes, nets, strict=True):
            rows = [r for r in found if r["net"] == net]
            dots = [(r["length"], norm) for r in rows for norm in r["draws"] if norm]
            axes.scatter([x for x, _ in dots], [y for _, y in dots], color=COLOURS[twin], s=10, alpha=0.4, linewidths=0)
            line = [(r["length"], r["norm"]) for r in rows if r["norm"]]
            axes.plot([x for x, _ in line], [y for _, y in line], color=COLOURS[twin])
            axes.set_yscale("log")
            factor = next(r["factor"] for r in records if r["kind"] == "paths" and r["net"] == net)
            titled(axes, f"{net}: gradient norm" + (f", x {factor:.2f} a branch" if factor else ""), "length of the path, in branches")
        rows = [{**row, "draw": draw, "norm": norm} for row in _rows(found, ("net", "length")) for draw, norm in _draws(found, row)]
        return [c.drawn(caption("Mean gradient norm at the input by path length, a dot a draw", found, MOST_NETS), rows)]


def _shares(records: list[Record]) -> list[Drawn]:
    found = [r for r in records if r["kind"] == "path" and r["share"] is not None]
    if not found:
        return []
    nets = _nets(found)
    with canvas(len(nets), 3.0) as c:
        for axes, (net, twin) in zip(c.axes, nets, strict=True):
            rows = [r for r in found if r["net"] == net]
            lengths = [r["length"] for r in rows]
            for key, colour, label in (("share", COLOURS[twin], "gradient"), ("paths", MUTED, "paths")):
                values = [100 * r[key] for r in rows]
                axes.fill_between(lengths, values, color=colour, alpha=0.15, linewidth=0)
                axes.plot(lengths, values, color=colour)
                _above(axes, lengths, values, label, colour)
            axes.set_ylim(0, 110 * max(max(r["share"], r["paths"]) for r in found))
            titled(axes, f"{net}: share, %", "length of the path, in branches")
        return [
            c.drawn(
                caption("Where the gradient comes from, and how many paths there are", found, MOST_NETS),
                _rows(found, ("net", "length", "norm", "share", "paths")),
            )
        ]


def _above(axes: Axes, x: Sequence[float], values: Sequence[float], label: str, colour: str) -> None:
    top = max(range(len(values)), key=lambda i: values[i])
    axes.annotate(label, (x[top], values[top]), xytext=(0, 5), textcoords="offset points", color=colour, fontsize=9, ha="center")


def _draws(found: list[Record], row: Row) -> list[tuple[int, float]]:
    return list(enumerate(next(r["draws"] for r in found if (r["net"], r["length"]) == (row["net"], row["length"]))))


def _rows(found: list[Record], keys: Sequence[str]) -> list[Row]:
    return [{key: r[key] for key in keys} for r in found]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
