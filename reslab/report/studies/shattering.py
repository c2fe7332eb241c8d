"""Gradients along a line and their autocorrelation: Balduzzi et al. 2017."""

from statistics import fmean

from reslab.report.charts import Drawn, Row, canvas, colours, titled
from reslab.report.svg import MUTED
from reslab.run import Record

SHOWN = (("plain, centred", 2), ("plain, batch norm", 50), ("residual, beta 0.1", 50), ("brown noise", 0), ("white noise", 0))
NOISES = ("brown noise", "white noise")
TWINS = colours(["residual", "plain"])


def figures(records: list[Record]) -> list[Drawn]:
    """Examples of gradients; correlation by lag, a panel a kind of net; the same between images."""
    dense = [r for r in records if r["kind"] == "correlation" and r["look"] == "dense"]
    images = [r for r in records if r["kind"] == "correlation" and r["look"] == "images" and r["values"]]
    return [*([_examples(dense), _dense(dense)] if dense else []), *([_images(images)] if images else [])]


def _examples(dense: list[Record]) -> Drawn:
    first = {(r["net"], r["layers"]): r["gradient"] for r in dense if r["seed"] == dense[0]["seed"]}
    with canvas(len(SHOWN), 2.1, grid=False) as c:
        for axes, net in zip(c.axes, SHOWN, strict=True):
            values = first[net]
            axes.plot([-2 + 4 * i / (len(values) - 1) for i in range(len(values))], values, color=TWINS["residual"], linewidth=0.7)
            axes.set_yticks([])
            titled(axes, f"{net[0]}\n{net[1]} layers" if net[1] else net[0], "input" if net[1] else "")
        rows = [{"net": net, "layers": depth, "point": i, "gradient": value} for (net, depth), values in first.items() for i, value in enumerate(values)]
        return c.drawn("The gradient along a line of inputs, one net each, in units of its largest value", rows)


def _dense(dense: list[Record]) -> Drawn:
    nets = list(dict.fromkeys(r["net"] for r in dense if r["net"] not in NOISES))
    curves = {(net, depth): _mean(dense, net, depth) for net, depth in dict.fromkeys((r["net"], r["layers"]) for r in dense)}
    with canvas(len(nets), 3.0) as c:
        for axes, net in zip(c.axes, nets, strict=True):
            for noise in NOISES:
                axes.plot(curves[noise, 0], color=MUTED, linestyle=":", linewidth=1.2)
                c.at_end(axes, len(curves[noise, 0]) - 1, curves[noise, 0][-1], noise.split()[0], MUTED)
            for depth, colour in colours([str(depth) for other, depth in curves if other == net]).items():
                curve = curves[net, int(depth)]
                axes.plot(curve, color=colour)
                c.at_end(axes, len(curve) - 1, curve[-1], f"{depth} layers", colour)
            titled(axes, net, "lag", "correlation" if axes is c.axes[0] else "")

        rows = [{"net": net, "layers": depth, "lag": lag, "correlation": round(v, 5)} for (net, depth), curve in curves.items() for lag, v in enumerate(curve)]
        return c.drawn("Correlation of gradients by lag, fully connected nets of 2, 24 and 50 layers, with white and brown noise", rows)


def _images(images: list[Record]) -> Drawn:
    depths = sorted({r["layers"] for r in images})
    rows: list[Row] = []
    with canvas(len(depths), 2.9) as c:
        for axes, depth in zip(c.axes, depths, strict=True):
            for twin, colour in TWINS.items():
                found = [r for r in images if (r["net"], r["layers"]) == (twin, depth)]
                for r in found:
                    axes.plot(r["values"], color=colour, linewidth=1, alpha=0.8)
                    rows += [{"net": twin, "layers": depth, "seed": r["seed"], "lag": lag, "correlation": round(v, 5)} for lag, v in enumerate(r["values"])]
                if found:
                    c.at_end(axes, len(found[0]["values"]) - 1, fmean(r["values"][-1] for r in found), twin, colour)
            titled(axes, f"{depth} layers", "lag, steps of 1/255 of the way", "correlation" if axes is c.axes[0] else "")
        return c.drawn("Correlation of gradients between two training images, convolutional nets, a line a seed", rows)


def _mean(dense: list[Record], net: str, depth: int) -> list[float]:
    return [fmean(values) for values in zip(*(r["values"] for r in dense if (r["net"], r["layers"]) == (net, depth)), strict=True)]
