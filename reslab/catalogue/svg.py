"""The strokes of a drawing: boxes, words, lines and arrowheads as SVG, one style sheet for light and dark."""

from html import escape

SHADES = 6  # of a layer, from no multiply-adds to the most
FONT = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
LIGHT = {
    "paper": "#ffffff", "card": "#f7f8fa", "edge": "#d5dae1", "ink": "#1b2430", "muted": "#5b6675", "wire": "#7d8896", "skip": "#c8500a", "plain": "#ffffff",
    "s0": "#eef3fa", "s1": "#d9e6f6", "s2": "#b5cfee", "s3": "#84aee1", "s4": "#2f6db8", "s5": "#14498c",
}  # fmt: skip
DARK = {
    "paper": "#12161c", "card": "#1b212a", "edge": "#343d4a", "ink": "#e8ecf2", "muted": "#a3adba", "wire": "#8792a1", "skip": "#ffa45c", "plain": "#12161c",
    "s0": "#1d2836", "s1": "#1f3550", "s2": "#234a78", "s3": "#2a62a3", "s4": "#8fbdf2", "s5": "#c3dcfa",
}  # fmt: skip
INK_ON_DARK_SHADES = {"light": "#ffffff", "dark": "#0b1320"}
NARROW, WIDE = set("ijltfrI.,:;|'- ()/·"), set("mwMW%→…")


class Drawing:
    """Collects strokes; x runs to the right and y down, in pixels. All text is escaped."""

    def __init__(self) -> None:
        self.strokes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str, radius: float = 4, tip: str = "") -> None:
        """A rectangle; `tip` is shown where the pointer rests."""
        shape = f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:g}"'
        self.strokes.append(f"{shape}><title>{escape(tip)}</title></rect>" if tip else f"{shape}/>")

    def words(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        """One line of text, its base at y."""
        self.strokes.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def path(self, steps: str, kind: str = "wire") -> None:
        self.strokes.append(f'<path class="{kind}" d="{steps}"/>')

    def head(self, x: float, y: float, kind: str = "head", down: bool = False) -> None:
        """An arrowhead whose tip is at (x, y)."""
        points = ((x, y), (x - 4, y - 8), (x + 4, y - 8)) if down else ((x, y), (x - 8, y - 4), (x - 8, y + 4))
        self.strokes.append(f'<polygon class="{kind}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')

    def disc(self, x: float, y: float, radius: float, kind: str) -> None:
        self.strokes.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>')

    def done(self, width: float, height: float, title: str, description: str) -> str:
        """The whole file. Title and description are what a screen reader says."""
        size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
        opening = f'<svg xmlns="http://www.w3.org/2000/svg" class="reslab" role="img" aria-label="{escape(title)}" {size}>'
        said = f"<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>"
        return "\n".join([opening, said, f"<style>{_style()}</style>", *self.strokes, "</svg>\n"])


def wide(text: str, size: float) -> float:
    """About how wide a sans serif sets a text, in pixels: there is no font here to measure."""
    return size * sum(0.31 if c in NARROW else 0.86 if c in WIDE else 0.7 if c.isupper() else 0.55 for c in text)


def _style() -> str:
    def colours(names: dict[str, str], on_dark: str) -> str:
        return ".reslab{" + "".join(f"--{name}:{value};" for name, value in names.items()) + f"--on:{on_dark}" + "}"

    rules = {
        "text": f"font-family:{FONT};font-size:12px;fill:var(--ink)",
        ".small": "font-size:11px",
        ".muted": "font-size:11.5px;fill:var(--muted)",
        ".title": "font-size:24px;font-weight:700",
        ".stage": "font-size:15px;font-weight:700",
        ".times": "font-size:16px;font-weight:700;fill:var(--skip)",
        ".plus": "font-size:17px;font-weight:700;fill:var(--paper)",
        ".formula": "font-size:11.5px;fill:var(--skip)",
        ".paper": "fill:var(--paper)",
        ".card": "fill:var(--card);stroke:var(--edge)",
        ".plain": "fill:var(--plain);stroke:var(--edge)",
        ".track": "fill:var(--edge)",
        ".meter": "fill:var(--s4)",
        ".wire": "fill:none;stroke:var(--wire);stroke-width:1.5",
        ".head": "fill:var(--wire)",
        ".skip": "fill:none;stroke:var(--skip);stroke-width:2.2",
        ".skiphead": "fill:var(--skip)",
        **{f".s{n}": f"fill:var(--s{n});stroke:var(--{'edge' if n < 2 else f's{n}'})" for n in range(SHADES)},
        ".on": "fill:var(--on)",
    }
    body = "".join(f".reslab {name}{{{rule}}}" for name, rule in rules.items())
    return f"{colours(LIGHT, INK_ON_DARK_SHADES['light'])}@media(prefers-color-scheme:dark){{{colours(DARK, INK_ON_DARK_SHADES['dark'])}}}{body}"
