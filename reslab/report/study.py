"""A study's records -> study.html: one page, no network, no script."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from reslab.errors import shown
from reslab.report.figures import MUTED, SERIES, STYLE, as_svg
from reslab.run import Record, write_whole

NAMES = {"plain": "plain", "resnet": "residual"}


def write_study(target: Path, facts: dict[str, Any], records: list[Record]) -> Path:
    """Draws the page of one study. `facts` are name, study, claims, data, size, protocol, command, cells, version, hardware."""
    environment = Environment(loader=PackageLoader("reslab", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    page = environment.get_template("study.html.j2").render(**facts, figures=FIGURES[facts["name"]](records))
    write_whole(target, page.encode("utf-8", "backslashreplace"))
    return target


def degradation(records: list[Record]) -> list[str]:
    """Training and test error by depth, every seed a dot; and the running training loss (He et al. 2015, figure 6)."""
    results, curves = ([r for r in records if r["kind"] == kind] for kind in ("result", "curve"))
    depths = sorted({r["depth"] for r in results})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        for axes, key in zip(figure.subplots(1, 2, sharey=True), ("train_error", "test_error"), strict=True):
            for kind, colour in zip(NAMES, SERIES, strict=True):
                rows = [r for r in results if r["cell_kind"] == kind]
                axes.scatter([depths.index(r["depth"]) for r in rows], [100 * r[key] for r in rows], color=colour, s=14, alpha=0.6)
                means = [_mean([100 * r[key] for r in rows if r["depth"] == depth]) for depth in depths]
                axes.plot(range(len(depths)), means, color=colour, label=NAMES[kind])
            axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
            axes.set_xlabel("layers")
            axes.set_title(f"{key.split('_')[0]} error, %", loc="left", fontsize=10)
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
        by_depth = as_svg(figure, "Error by depth, plain and residual, a dot a seed")
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        for axes, depth in zip(figure.subplots(1, len(depths), sharey=True), depths, strict=True):
            for kind, colour in zip(NAMES, SERIES, strict=True):
                for row in (r for r in curves if (r["cell_kind"], r["depth"]) == (kind, depth)):
                    axes.plot([row["every"] * (i + 0.5) for i in range(len(row["loss"]))], row["loss"], color=colour, linewidth=1, alpha=0.8)
            axes.axhline(0, color=MUTED, linewidth=0.5)
            axes.set_title(f"{depth} layers", loc="left", fontsize=10)
            axes.set_xlabel("step")
        return [by_depth, as_svg(figure, "Training loss by step, plain and residual, a line a seed")]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


FIGURES: dict[str, Callable[[list[Record]], list[str]]] = {"degradation": degradation}
