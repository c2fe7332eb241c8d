import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import pytest

import reslab
from reslab.catalogue.drawing import drawing
from reslab.family import FAMILY
from reslab.layout import parts
from reslab.spec import Spec

SVG = "{http://www.w3.org/2000/svg}"
CROWDED = reslab.spec("resnet20", norm="none", carry="exclusive-gate", shortcut="D", squeeze=8, dropout=0.25)
DRAWN: list[tuple[str, Spec, int]] = [*((name, row.spec, row.image_size) for name, row in FAMILY.items()), ("crowded", CROWDED, 32)]


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float
    tip: str


def elements(text: str, tag: str) -> list[ET.Element]:
    return list(ET.fromstring(text).iter(SVG + tag))


def boxes(text: str, kinds: str) -> list[Box]:
    """Rectangles whose class the pattern fits, those of the legend left out: they have no tip."""
    found = []
    for rect in elements(text, "rect"):
        tip = rect.find(SVG + "title")
        if re.fullmatch(kinds, rect.get("class", "")) and (tip is not None or kinds == "card"):
            x, y, width, height = (float(rect.get(key, "")) for key in ("x", "y", "width", "height"))
            found.append(Box(x, y, x + width, y + height, "" if tip is None else tip.text or ""))
    return found


@pytest.mark.parametrize(("name", "spec", "size"), DRAWN, ids=[name for name, _, _ in DRAWN])
def test_every_layer_is_drawn_inside_a_card_and_none_over_another(name: str, spec: Spec, size: int) -> None:
    text = drawing(name, spec, size, "here")
    layers, cards = boxes(text, "plain|s[1-5]"), boxes(text, "card")
    told = [layer for part in parts(spec, size) for layer in part.layers if not layer.kind.startswith("add")]
    assert len(layers) == sum(".se." not in layer.name or layer.kind == "multiply" for layer in told)
    for a in layers:
        assert any(c.left <= a.left and a.right <= c.right and c.top <= a.top and a.bottom <= c.bottom for c in cards), a
        assert not any(a is not b and a.left < b.right and b.left < a.right and a.top < b.bottom and b.top < a.bottom for b in layers), a
    width, height = float(ET.fromstring(text).get("width", "")), float(ET.fromstring(text).get("height", ""))
    assert all(c.right < width and c.bottom < height for c in cards)


def helvetica() -> dict[str, float]:
    """Widths of its characters as parts of the size, from the metrics that matplotlib brings; what it has not is as wide as an em."""
    import matplotlib

    lines = (Path(matplotlib.get_data_path()) / "fonts" / "afm" / "phvr8a.afm").read_text().splitlines()
    rows = [re.match(r"C (-?\d+) ; WX (\d+) ; N (\w+)", line) for line in lines]
    return {chr(int(row[1])) if int(row[1]) > 0 else {"multiply": "×"}.get(row[3], row[3]): int(row[2]) / 1000 for row in rows if row}


def test_words_fit_their_boxes() -> None:
    widths = helvetica()
    assert widths["W"] > widths["i"] > 0.2
    for name, spec, size in DRAWN:
        needed: dict[ET.Element, float] = {}
        box = None
        for element in ET.fromstring(drawing(name, spec, size, "")):
            words, kind = element.text or "", element.get("class")
            if element.tag == SVG + "rect":
                box = element if element.find(SVG + "title") is not None else None
            elif element.tag == SVG + "text" and box is not None and kind in ("", "small", "on"):
                set_in = (11 if kind == "small" else 12) * sum(widths.get(c, 1.0) for c in words)
                needed[box] = max(set_in, needed.get(box, 0))
            else:
                box = None
        assert needed
        for box, width in needed.items():
            assert width + 8 <= float(box.get("width", "")) <= width + 24, (name, ET.tostring(box))


def test_a_shortcut_is_drawn_for_every_card_of_a_residual_net_and_for_none_of_its_plain_twin() -> None:
    for name, shortcuts in (("resnet20", 5), ("plain20", 0)):
        paths = [path for path in elements(drawing(name, FAMILY[name].spec, 32, ""), "path") if path.get("class") == "skip"]
        assert len(paths) == shortcuts + bool(shortcuts), "one more in the legend"


def test_a_projection_leaves_where_pre_activation_lets_it() -> None:
    spec = FAMILY["preact164"].spec
    text = drawing("preact164", spec, 32, "")
    relu = next(box for box in boxes(text, "plain") if box.tip.startswith("layer2.0.relu1"))
    first = next(box for box in boxes(text, "s[1-5]") if box.tip.startswith("layer2.0.conv1"))
    starts = [float(re.match(r"M([\d.]+)", path.get("d", ""))[1]) for path in elements(text, "path") if path.get("class") == "skip"]  # type: ignore[index]
    assert any(relu.right < start < first.left for start in starts)


def test_the_file_is_whole_escaped_and_says_itself_to_a_screen_reader() -> None:
    text = drawing("<b>&\"'", FAMILY["resnet50"].spec, 224, "]]><script>alert(1)</script>")
    root = ET.fromstring(text)
    assert root.get("role") == "img"
    assert root.find(SVG + "title").text == "<b>&\"': a residual network layer by layer"  # type: ignore[union-attr]
    description = root.find(SVG + "desc").text or ""  # type: ignore[union-attr]
    assert "25,557,032 parameters" in description
    assert "stage 3: 6 blocks, output 1024 × 14 × 14, 35.8% of the multiply-adds" in description
    assert not elements(text, "script")
    assert "prefers-color-scheme:dark" in text
    assert re.findall(r"(?:href|src|url\()", text) == []
    assert text.count("http") == 1, "the name space and nothing to fetch"


def test_equal_blocks_are_one_card_with_their_number() -> None:
    texts = [text.text for text in elements(drawing("resnet1202", FAMILY["resnet1202"].spec, 32, ""), "text")]
    assert {"× 200", "× 199", "layer2.1 – layer2.199"} <= set(texts)
