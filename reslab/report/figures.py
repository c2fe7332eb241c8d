"""A run's records -> its figures."""

import matplotlib
from matplotlib.figure import Figure

from reslab.report.charts import as_typed
from reslab.report.svg import GRID, MUTED, SERIES, STYLE, as_svg
from reslab.run import Record


def curves(epochs: list[Record], val: list[Record], steps: list[Record]) -> str:
    """Loss and top-1 by epoch, training against val, and the learning rate by step, side by side."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        loss, top1, rate = figure.subplots(1, 3)
        for axes, key, title, scale in ((loss, "loss", "loss", 1), (top1, "top1", "top-1, %", 100)):
            for rows, name, colour in ((epochs, "train", SERIES[0]), (val, "val", SERIES[1])):
                x, y = [r["epoch"] for r in rows], [scale * r[key] for r in rows]
                axes.plot(x, y, color=colour, marker="o" if len(x) < 3 else None, label=name)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("epoch")
            axes.legend(frameon=False, fontsize=9)
        loss.set_ylim(bottom=0, top=1.15 * max((r["loss"] for r in [*epochs, *_without_peaks(val)]), default=1))
        rate.plot([r["step"] for r in steps], [r["lr"] for r in steps], color=SERIES[0], marker="o" if len(steps) < 3 else None)
        rate.set_title("learning rate", loc="left", fontsize=10)
        rate.set_xlabel("step")
        rate.set_ylim(bottom=0)
        for axes in (loss, top1, rate):
            axes.locator_params(axis="x", integer=True, nbins=6)
        return as_svg(figure, "Loss, top-1 and learning rate over the training")


def calibration(scores: Record) -> str:
    """The reliability diagram, before and after temperature scaling; the diagonal is perfect."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, key, name in ((left, "before", "before"), (right, "after", "after")):
            rows = scores["reliability"][key]
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle="--")
            share = [r["n"] / scores["n"] for r in rows]
            axes.bar([(r["bin"] + 0.5) / 15 for r in rows], share, width=1 / 15, color=GRID, label="share of images")
            axes.plot([r["confidence"] for r in rows], [r["top1"] for r in rows], color=SERIES[0], marker="o", markersize=4, label="top-1")
            axes.set_title(f"{name} temperature scaling", loc="left", fontsize=10)
            axes.set_xlabel("confidence")
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1.02)
        left.set_ylabel("top-1")
        left.legend(frameon=False, fontsize=9, loc="upper left")
        return as_svg(figure, "Reliability diagram: top-1 against confidence")


def confusion(matrix: list[tuple[int, int, int]], classes: list[str]) -> str:
    """The confusion matrix of many classes as a map, rows normalised; a table serves up to 20 classes better."""
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(7, 7), layout="constrained")
        axes = figure.subplots()
        totals: dict[int, int] = {}
        for label, _, count in matrix:
            totals[label] = totals.get(label, 0) + count
        share = [count / totals[label] for label, _, count in matrix]
        x, y = [p for _, p, _ in matrix], [label for label, _, _ in matrix]
        side = 440 / len(classes)
        axes.scatter(x, y, s=side**2, marker="s", c=SERIES[0], alpha=[max(0.04, s) for s in share], linewidths=0)  # type: ignore[arg-type]
        axes.set_xlim(-0.5, len(classes) - 0.5)
        axes.set_ylim(len(classes) - 0.5, -0.5)
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")
        ticks = range(0, len(classes), max(1, len(classes) // 25))
        axes.set_xticks(ticks, [_short(classes[i]) for i in ticks], rotation=90, fontsize=7)
        axes.set_yticks(ticks, [_short(classes[i]) for i in ticks], fontsize=7)
        return as_svg(figure, "Confusion matrix")


def _short(name: str) -> str:
    """A class name as a tick label."""
    return as_typed(name[:16])


def _without_peaks(rows: list[Record]) -> list[Record]:
    """Without the highest tenth: one wild epoch of val must not flatten the curve."""
    return sorted(rows, key=lambda r: r["loss"])[: max(1, len(rows) - len(rows) // 10)] if rows else []
