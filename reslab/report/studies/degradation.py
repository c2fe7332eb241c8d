"""Error by depth, and the running training loss: He et al. 2015, figure 6."""

from reslab.report.charts import Drawn, canvas, colours, titled, with_seeds
from reslab.report.svg import MUTED
from reslab.run import Record

COLOURS = colours(["residual", "plain"])


def figures(records: list[Record]) -> list[Drawn]:
    """Training and test error by depth, every seed a dot; and the loss by step, every seed a line."""
    return [_by_depth([r for r in records if r["kind"] == "result"]), _by_step([r for r in records if r["kind"] == "curve"])]


def _by_depth(results: list[Record]) -> Drawn:
    depths = sorted({r["layers"] for r in results})
    with canvas(2, 3.2) as c:
        for axes, key in zip(c.axes, ("train_error", "test_error"), strict=True):
            for twin, colour in COLOURS.items():
                values = [[100 * r[key] for r in results if (r["twin"], r["layers"]) == (twin, depth)] for depth in depths]
                with_seeds(c, axes, range(len(depths)), values, colour, twin)
            axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
            axes.set_xlim(-0.2, len(depths) - 0.6)
            titled(axes, f"{key.split('_')[0]} error, %", "layers")
        c.axes[0].set_ylim(bottom=0)
        rows = [{key: r[key] for key in ("twin", "layers", "seed", "train_error", "test_error", "steps", "parameters")} for r in results]
        return c.drawn("Error by depth, plain and residual, a dot a seed", rows)


def _by_step(curves: list[Record]) -> Drawn:
    depths = sorted({r["layers"] for r in curves})
    with canvas(len(depths), 2.9) as c:
        for axes, depth in zip(c.axes, depths, strict=True):
            for row in (r for r in curves if r["layers"] == depth):
                x = [row["every"] * (i + 0.5) for i in range(len(row["loss"]))]
                loss = [float("nan") if v is None else v for v in row["loss"]]
                axes.plot(x, loss, color=COLOURS[row["twin"]], linewidth=1, alpha=0.8)
                if not row["seed"]:
                    c.at_end(axes, x[-1], loss[-1], row["twin"], COLOURS[row["twin"]])
            axes.axhline(0, color=MUTED, linewidth=0.5)
            axes.margins(x=0.01)
            titled(axes, f"{depth} layers", "step")
        rows = [
            {"twin": r["twin"], "layers": r["layers"], "seed": r["seed"], "step": r["every"] * i, "loss": loss}
            for r in curves
            for i, loss in enumerate(r["loss"])
        ]
        return c.drawn("Training loss by step, plain and residual, a line a seed", rows)
