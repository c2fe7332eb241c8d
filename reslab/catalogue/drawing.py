"""One network as a picture: an SVG that stands alone, for light and dark, to be put into a paper or a lecture.

Rows from top to bottom are the stem, the stages and the head. In a row the signal runs from left to right through the
layers of a block, and the shortcut bows over them; equal blocks are one card with their number. The darker a layer, the
more of the multiply-adds it takes. Standard library only.
"""

from itertools import groupby
from typing import NamedTuple

from reslab.catalogue.scene import LOW, TALL, Box, Scene, scene
from reslab.catalogue.svg import SHADES, Drawing, wide
from reslab.layout import Part, Shape, parts
from reslab.spec import Spec

MARGIN, LABELS, TOP = 28, 190, 92  # around all, the column of words, the title
GAP, PAD, BETWEEN = 12, 20, 34  # between boxes, inside a card, between cards
RISE, ROW_GAP = 58, 40  # of the shortcut over the branch; between rows
PLUS = 11  # radius
BEND, BOW, LEAST_BEND = 9, 64, 26  # radius of a wire's corner, and of the shortcut's: at most, and at least
LEFT = MARGIN + LABELS


class Row(NamedTuple):
    """The stem, a stage or the head."""

    name: str
    parts: list[Part]
    scenes: list[Scene]
    cost: tuple[float, float]  # shares of the multiply-adds and the parameters

    @property
    def shape(self) -> Shape:
        return self.parts[-1].layers[-1].shape

    @property
    def bowed(self) -> bool:
        return any(s.join is not None for s in self.scenes)

    @property
    def above(self) -> float:
        """From the top of its cards to the line on which its boxes stand."""
        named = 38 if self.parts[0].blocks else 32
        return named + (RISE if self.bowed else 10) + 20 * any(s.gate for s in self.scenes)

    @property
    def height(self) -> float:
        return self.above + 34 + 20 * any(s.formula for s in self.scenes)


def drawing(name: str, spec: Spec, image_size: int, source: str) -> str:
    """The picture of a network for images of that size, as the text of an SVG file."""
    made, cost = _rows(spec, image_size), spec.cost(image_size)
    on = Drawing()
    darkest = max(box.share for row in made for s in row.scenes for box in (*s.main, *s.side, *s.gate))
    y, right = float(TOP + 26), 0.0
    bends: list[tuple[float, float]] = []  # where each row ends
    for index, row in enumerate(made):
        line = y + row.above
        _enter(on, line, bends[-1] if bends else None, y - ROW_GAP / 2, (spec.in_channels, image_size, image_size) if not index else made[index - 1].shape)
        _label(on, row, y)
        end = _cards(on, row, y, darkest)
        bends.append((end, line))
        right = max(right, end)
        y += row.height + ROW_GAP
    _leave(on, *bends[-1], spec.num_classes)
    told = f"{cost.params:,} parameters · {_many(cost.macs)} multiply-adds at {image_size} px · {source}"
    right = max(right + 2 * MARGIN, bends[-1][0] + 130, 2 * MARGIN + max(wide(name, 24), wide(told, 13), 804))
    on.words(MARGIN, 48, name, "title", "start")
    on.words(MARGIN, 70, told, "muted", "start")
    _legend(on, made, y + 4, darkest)
    on.strokes.insert(0, f'<rect class="paper" width="{right:.0f}" height="{y + 40:.0f}"/>')
    return on.done(right, y + 40, f"{name}: a residual network layer by layer" if spec.shortcut != "none" else f"{name}: a plain network", _told(made, told))


def _rows(spec: Spec, image_size: int) -> list[Row]:
    """Stem, stages and head; the stages' blocks are named layer1.0 and so on."""
    made, cost = parts(spec, image_size), spec.cost(image_size)
    grouped = [list(group) for _, group in groupby(made, lambda part: part.blocks[0].split(".")[0] if part.blocks else "")]
    names = ["stem", *(f"stage {n}" for n in range(1, len(grouped) - 1)), "head"]
    shapes = {"input": (spec.in_channels, image_size, image_size)} | {layer.name: layer.shape for part in made for layer in part.layers}
    rows = []
    for name, group in zip(names, grouped, strict=True):
        macs = sum(part.times * layer.macs for part in group for layer in part.layers) / cost.macs
        params = sum(part.times * layer.params for part in group for layer in part.layers) / cost.params
        rows.append(Row(name, group, [scene(part, cost.macs, shapes) for part in group], (macs, params)))
    return rows


def _told(rows: list[Row], costs: str) -> str:
    """The picture in words."""
    lines = [costs]
    for row in rows:
        blocks = sum(len(part.blocks) for part in row.parts)
        lines.append(f"{row.name}: {f'{blocks} blocks, ' if blocks else ''}output {_shape(row.shape)}, {row.cost[0]:.1%} of the multiply-adds")
    return "; ".join(lines) + "."


def _shape(shape: Shape) -> str:
    return " × ".join(map(str, shape))


def _many(n: int) -> str:
    return f"{n / 1e9:,.2f} G" if n >= 10**9 else f"{n / 1e6:,.1f} M"


def _enter(on: Drawing, line: float, before: tuple[float, float] | None, gap: float, shape: Shape) -> None:
    """The wire from the end of the row before, or from the image, to the first card; the tensor's size on it."""
    x, b = LEFT - 16, BEND
    if before is None:
        on.path(f"M{x} {gap + 2:.1f}V{line - b:.1f}q0 {b} {b} {b}H{LEFT - 6}")
        on.words(x - 4, gap - 6, f"image {_shape(shape)}", "small", "start")
    else:
        end, old = before
        on.path(f"M{end:.1f} {old:.1f}h{18 - b}q{b} 0 {b} {b}V{gap - b:.1f}q0 {b} -{b} {b}H{x + b}q-{b} 0 -{b} {b}V{line - b:.1f}q0 {b} {b} {b}H{LEFT - 6}")
        text = _shape(shape)
        on.box(LEFT + 12, gap - 8, wide(text, 11) + 12, 16, "paper", 0)
        on.words(LEFT + 18, gap + 4, text, "small", "start")
    on.head(LEFT - 1, line)


def _leave(on: Drawing, x: float, line: float, classes: int) -> None:
    on.path(f"M{x:.1f} {line:.1f}h22")
    on.head(x + 28, line)
    on.words(x + 34, line + 4, f"{classes} logits" if classes > 1 else "1 logit", "small", "start")


def _label(on: Drawing, row: Row, y: float) -> None:
    """A row's name, size and shares of the cost, in the column on the left."""
    blocks = sum(len(part.blocks) for part in row.parts)
    y += max(0.0, (row.height - 84) / 2)
    on.words(MARGIN, y + 14, row.name, "stage", "start")
    count = f"{blocks} block{'s' * (blocks > 1)} · " if blocks else ""
    on.words(MARGIN, y + 31, f"{count}{_shape(row.shape)}", "muted", "start")
    for index, (what, share) in enumerate(zip(("multiply-adds", "parameters"), row.cost, strict=True)):
        top, width = y + 48 + 22 * index, LABELS - 48
        on.words(MARGIN, top, what, "small", "start")
        on.words(MARGIN + width, top, f"{share:.1%}", "small", "end")
        on.box(MARGIN, top + 4, width, 4, "track", 2)
        if share > 0:
            on.box(MARGIN, top + 4, max(1.5, share * width), 4, "meter", 2)


def _cards(on: Drawing, row: Row, y: float, darkest: float) -> float:
    """The cards of a row, from the left; where the last one ends."""
    x, line = float(LEFT), y + row.above
    for index, (part, s) in enumerate(zip(row.parts, row.scenes, strict=True)):
        if index:
            on.path(f"M{x:.1f} {line:.1f}H{x + BETWEEN - 6:.1f}")
            on.head(x + BETWEEN - 1, line)
            x += BETWEEN
        width = _width(part, s)
        for back in (8, 4, 0) if part.times > 1 else (0,):
            on.box(x + back, y + back, width, row.height, "card", 8)
        if part.blocks:
            first, last = part.blocks[0], part.blocks[-1]
            on.words(x + PAD, y + 20, first if first == last else f"{first} – {last}", "muted", "start")
        if part.times > 1:
            on.words(x + width - PAD, y + 22, f"× {part.times}", "times", "end")
        _block(on, s, x, width, line, darkest)
        x += width
    return x


def _width(part: Part, s: Scene) -> float:
    """Of a card: its boxes or its words, whichever is wider."""
    words = 0.0
    if part.blocks:
        words = wide(f"{part.blocks[0]} – {part.blocks[-1]}" if part.times > 1 else part.blocks[0], 11.5) + 60 * (part.times > 1)
    return max(_branch_span(s), words) + 2 * PAD


def _span(boxes: list[Box], gap: float = GAP) -> float:
    return sum(box.width for box in boxes) + gap * max(0, len(boxes) - 1)


def _side_span(s: Scene) -> float:
    return _span([*s.side, *s.gate]) + 2 * GAP * bool(s.gate)


def _gap(s: Scene) -> float:
    """Between the boxes of a branch: more than usual where the shortcut over them carries more than they are wide."""
    if s.join is None or not s.side + s.gate:
        return GAP
    under = s.main[s.fork : s.join]
    return max(GAP, (_side_span(s) + 2 * LEAST_BEND - sum(box.width for box in under) - PLUS) / (len(under) + 0.5))


def _branch_span(s: Scene) -> float:
    return _span(s.main, _gap(s)) + (2 * PLUS + _gap(s) if s.join is not None else 0)


def _block(on: Drawing, s: Scene, x: float, width: float, line: float, darkest: float) -> None:
    """A card's boxes on their line, the addition among them, and the shortcut over them."""
    on.path(f"M{x:.1f} {line:.1f}h{width:.1f}")
    gap = _gap(s)
    here = x + (width - _branch_span(s)) / 2
    fork = here
    for index, box in enumerate([*s.main, None]):
        if index == s.fork:
            fork = here - gap / 2
        if index == s.join:
            _shortcut(on, s, fork, here + PLUS, line, darkest)
            here += 2 * PLUS + gap
        if box:
            _box(on, box, here, line, darkest)
            here += box.width + gap


def _shortcut(on: Drawing, s: Scene, start: float, end: float, line: float, darkest: float) -> None:
    """From `start` up, over the branch, down to the addition at `end`."""
    side = _side_span(s)
    r = min(BOW, (end - start - side) / 2)
    top, foot = line - RISE, line - PLUS - 4
    rise = f"C{start:.1f} {top + 12:.1f} {start + r / 3:.1f} {top:.1f} {start + r:.1f} {top:.1f}"
    fall = f"C{end - r / 3:.1f} {top:.1f} {end:.1f} {top + 12:.1f} {end:.1f} {foot:.1f}"
    on.path(f"M{start:.1f} {line:.1f}{rise}H{end - r:.1f}{fall}", "skip")
    here = (start + end - side) / 2
    for box in [*s.side, *s.gate]:
        if s.gate and box is s.gate[0]:  # x itself goes on beside its gate
            on.path(f"M{here:.1f} {top:.1f}q2 -29 16 -29h{_span(s.gate) + 2 * GAP - 32:.1f}q14 0 16 29", "skip")
            here += GAP
        _box(on, box, here, top, darkest)
        here += box.width + GAP
    on.disc(start, line, 3, "skiphead")
    on.disc(end, line, PLUS, "skiphead")
    on.head(end, line - PLUS, "skiphead", down=True)
    on.words(end, line + 6, "+", "plus")
    if s.formula:
        on.words(end, line + TALL / 2 + 16, s.formula, "formula")


def _box(on: Drawing, box: Box, x: float, line: float, darkest: float) -> None:
    shade = min(SHADES - 1, 1 + int((SHADES - 1) * box.share / darkest)) if len(box.lines) > 1 else 0
    on.box(x, line - box.height / 2, box.width, box.height, f"s{shade}" if shade else "plain", 5 if box.height == TALL else LOW / 2, box.tip)
    kind = "on" if shade >= SHADES - 2 else ""
    if len(box.lines) == 1:
        on.words(x + box.width / 2, line + 4, box.lines[0], "small")
    else:
        on.words(x + box.width / 2, line - 4, box.lines[0], kind)
        on.words(x + box.width / 2, line + 12, box.lines[1], kind)


def _legend(on: Drawing, rows: list[Row], y: float, darkest: float) -> None:
    x, words = float(MARGIN), "share of the multiply-adds, all repeats together:  0%"
    on.words(x, y + 11, words, "muted", "start")
    x += wide(words, 11.5) + 6
    for shade in range(1, SHADES):
        on.box(x, y, 26, 14, f"s{shade}", 2)
        x += 28
    on.words(x + 4, y + 11, f"{darkest:.1%}", "muted", "start")
    x += 70
    if any(row.bowed for row in rows):
        on.path(f"M{x:.1f} {y + 13:.1f}q2 -12 14 -12h10q12 0 14 12", "skip")
        on.words(x + 48, y + 11, "shortcut", "muted", "start")
        x += 122
    if any(part.times > 1 for row in rows for part in row.parts):
        on.words(x, y + 12, "× n", "times", "start")
        on.words(x + 34, y + 11, "equal blocks in a row", "muted", "start")
