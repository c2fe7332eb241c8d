"""Direction and size of a block's step, read-outs, and distance to the stage's last: Jastrzebski et al. 2018, Greff et al. 2017."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from reslab.report.charts import Canvas, Drawn, Row, canvas, caption, colours, titled
from reslab.report.svg import MUTED
from reslab.run import Record

COLOURS = colours(["residual", "plain", "untrained"])
MOST_NETS = 4  # panels side by side: of more nets, the first


def figures(records: list[Record]) -> list[Drawn]:
    """What was measured of these; every panel is a net, gaps in lines are changes of stage."""
    steps = [r for r in records if r["kind"] == "step"]
    return [*_steps(steps), *_read_outs([r for r in records if r["kind"] == "read-out"]), *_differences([r for r in records if r["kind"] == "difference"])]


def _panels(c: Canvas, found: list[Record], title: str) -> list[tuple[Axes, str, list[Record]]]:
    """Axes, colour and records of each net."""
    made = []
    for axes, (net, twin) in zip(c.axes, _nets(found), strict=True):
        titled(axes, f"{net}\n{title}", "block")
        made.append((axes, COLOURS[twin], [r for r in found if r["net"] == net]))
    return made


def _nets(rows: list[Record]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["net"], r["twin"]) for r in rows))[:MOST_NETS]


def _steps(found: list[Record]) -> list[Drawn]:
    made = []
    for key, title, told in (
        (
            "cosine",
            "cosine with the negative gradient",
            "Where a block moves its input: the branch (filled; a plain net has none), output minus input (hollow)",
        ),
        ("ratio", "norm relative to the input's", "How far a block moves its input: the branch (filled; a plain net has none), output minus input (hollow)"),
    ):
        if any(r[key] is not None for r in found):
            with canvas(len(_nets(found)), 3.3) as c:
                for axes, colour, rows in _panels(c, found, title):
                    for name, fill in ((f"change_{key}", "none"), (key, colour)):
                        some = [r for r in rows if r[name] is not None and not (fill != "none" and r["twin"] == "plain")]
                        axes.scatter([r["number"] + 1 for r in some], [r[name] for r in some], s=24, facecolors=fill, edgecolors=colour, zorder=3)
                    axes.axhline(0, color=MUTED, linewidth=1)
                keys = ("net", "block", "number", "stage", key, f"change_{key}", "n")
                made.append(c.drawn(caption(told, found, MOST_NETS), _rows(found, keys)))
    return made


def _read_outs(found: list[Record]) -> list[Drawn]:
    if not found:
        return []
    with canvas(len(_nets(found)), 3.3) as c:
        for axes, colour, rows in _panels(c, found, "error of a read-out, %"):
            for stage in _by_stage(rows):
                axes.plot([r["number"] + 1 for r in stage], [100 * r["error"] for r in stage], color=MUTED, marker="o", markersize=3, linewidth=1.2)
            heads = [r for r in rows if "head_error" in r]
            axes.plot([r["number"] + 1 for r in heads], [100 * r["head_error"] for r in heads], color=colour, marker="o", markersize=4)
            _label(axes, rows[0]["number"] + 1, 100 * rows[0]["error"], "fitted by ridge", MUTED)
            _label(axes, heads[0]["number"] + 1, 100 * heads[0]["head_error"], "own head", colour, right=True)
            axes.set_ylim(0, 105)
        keys = ("net", "block", "number", "stage", "error", "images")
        return [
            c.drawn(
                caption("Test error when a block's output is read", found, MOST_NETS),
                [{**row, "head_error": r.get("head_error")} for r, row in zip(found, _rows(found, keys), strict=True)],
            )
        ]


def _differences(found: list[Record]) -> list[Drawn]:
    if not found:
        return []
    with canvas(len(_nets(found)), 3.3) as c:
        for axes, colour, rows in _panels(c, found, "difference from the stage's last"):
            for stage in _by_stage(rows):
                x = [r["number"] + 1 for r in stage]
                axes.plot(x, [r["rms"] for r in stage], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
                axes.errorbar(x, [r["mean"] for r in stage], [r["spread"] for r in stage], color=colour, marker="o", markersize=3, linewidth=1.2, capsize=0)
            axes.axhline(0, color=MUTED, linewidth=1)
        title = "Output minus that of the stage's last block, in its standard deviations: mean and spread over features (dots), root mean square (dashed)"
        return [c.drawn(caption(title, found, MOST_NETS), _rows(found, ("net", "block", "number", "stage", "mean", "spread", "rms", "images")))]


def _by_stage(rows: list[Record]) -> list[list[Record]]:
    return [[r for r in rows if r["stage"] == stage] for stage in sorted({r["stage"] for r in rows})]


def _label(axes: Axes, x: float, y: float, text: str, colour: str, right: bool = False) -> None:
    axes.annotate(text, (x, y), xytext=(0, 10), textcoords="offset points", color=colour, fontsize=9, ha="right" if right else "left")


def _rows(found: list[Record], keys: Sequence[str]) -> list[Row]:
    return [{key: r[key] for key in keys} for r in found]
