"""matplotlib -> inline SVG. Colours are CSS variables of the page, so that one figure serves light, dark and print."""

import html
import io
import re
import warnings
import zlib
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#040404", "#050505", "#060606", "#070707", "#080808")  # distinct for colour-blind readers too
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | dict(zip(SERIES, ("--first", "--second", "--third", "--fourth", "--fifth"), strict=True))
HEAT = "cividis"  # for maps: ordered in lightness, and read alike by colour-blind readers
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reslab",  # equal records give an equal page
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
}


def as_svg(figure: Figure, title: str) -> str:
    """The figure as inline SVG with the page's colours; equal records give equal text."""
    held = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # text stays text: the browser's fonts draw it
        figure.savefig(held, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    text = held.getvalue().decode()
    text = text[text.index("<svg") :]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    label = html.escape(title)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', lambda m: f'<svg role="img" aria-label="{label}" {m[1]}', text, count=1)
    text = re.sub(r"<svg ([^>]*?)height=\"[^\"]*pt\" ", r"<svg \1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return _unique_ids(text, title)


def standalone(svg: str) -> bytes:
    """Inline SVG as a file of its own: it brings the page's colours, light and dark, and its name space."""
    style = (Path(__file__).parent / "style.css").read_text("utf-8")
    colours = style[: style.index("* {")]  # the variables come first
    opened = re.sub(r"<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ' if "xmlns=" not in svg[: svg.index(">")] else "<svg ", svg, count=1)
    return re.sub(
        r"(<svg [^>]*>)", lambda m: f"{m[1]}\n<style>{colours}</style>\n<rect width='100%' height='100%' fill='var(--card)'/>", opened, count=1
    ).encode()


def _unique_ids(svg: str, title: str) -> str:
    """matplotlib numbers ids alike in every figure; on one page they must differ."""
    prefix = f"f{zlib.crc32(title.encode()):08x}"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(xlink:href="#)([^"]+)"', rf'\1{prefix}-\2"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
