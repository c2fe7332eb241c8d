"""The page in a real browser: an image in, classes, heat map and "not sure" out, with nothing for axe-core to complain of."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.serving import Server, image, make_run, serving

AXE = Path(os.environ.get("RESLAB_AXE", "node_modules/axe-core/axe.min.js"))
FIRST_PAINT = 500  # ms
DROP = """(files) => {
  const data = new DataTransfer();
  for (const [name, type, bytes] of files) data.items.add(new File([new Uint8Array(bytes)], name, { type }));
  document.getElementById("zone").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""
IDLE = "!document.body.classList.contains('busy')"
PASTE = DROP.replace(
    'document.getElementById("zone").dispatchEvent(new DragEvent("drop", { dataTransfer: data, ',
    'document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, ',
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(make_run(tmp_path_factory.mktemp("made") / "my <run>"), "--max-body", "1") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def until(page: Any, expression: str, argument: object = None, limit: float = 30) -> Any:
    """What the expression gives once it is true. Asked from here: Playwright's own waiting calls `eval` in the page, which its policy forbids."""
    deadline = time.monotonic() + limit
    while not (found := page.evaluate(expression, argument)):
        assert time.monotonic() < deadline, f"not true within {limit} s: {expression}"
        page.wait_for_timeout(20)
    return found


class Tab:
    """The page, open, with what the browser complained of."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.page = browser.new_context(**options).new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(f"http://127.0.0.1:{server.port}/")
        until(self.page, "document.getElementById('about').textContent")

    def give(self, name: str, body: bytes, how: str = DROP) -> None:
        self.page.evaluate(how, [[name, "image/png", list(body)]])
        until(self.page, f"name => {IDLE} && !document.getElementById('result').hidden"
                         " && document.getElementById('file').textContent.includes(name)", name)  # fmt: skip

    def text(self, selector: str) -> str:
        found: str = self.page.inner_text(selector)
        return found


def images(server: Server) -> dict[bool, bytes]:
    """An image that the net is sure of, and one that it is not."""
    found: dict[bool, bytes] = {}
    for seed in range(200):
        body = image(seed)
        found.setdefault(json.loads(server.predict(body)[2])["predictions"][0]["sure"], body)
        if len(found) == 2:
            return found
    raise AssertionError("the net is always or never sure")


def test_a_dropped_image_is_classified_with_its_heat_map(browser: Any, server: Server) -> None:
    tab = Tab(browser, server)
    tab.give("sure.png", images(server)[True])
    assert tab.text("#verdict") == "Confident"
    assert tab.text("#label") == tab.text("#bars li:first-child span:first-child")
    assert tab.page.locator("#bars li").count() == 3
    heat = tab.page.evaluate("""() => {
      const canvas = document.getElementById("heat"), data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      return { hidden: canvas.hidden, width: canvas.width, warm: data.filter((value, i) => i % 4 === 3 && value > 100).length,
               share: parseFloat(canvas.style.width), opacity: getComputedStyle(canvas).opacity };
    }""")
    assert (heat["hidden"], heat["width"], heat["opacity"]) == (False, 24, "0.65")
    assert heat["warm"] > 10, "something must be seen of it"
    assert heat["share"] == pytest.approx(100 * 30 / 40 * 24 / 28, abs=0.1), "over what the net saw of a 40 x 30 px image"
    tab.page.locator("#opacity").focus()
    tab.page.keyboard.press("Home")
    assert tab.page.evaluate("getComputedStyle(document.getElementById('heat')).opacity") == "0"
    assert tab.text("#opacity-value") == "0\N{NO-BREAK SPACE}%"
    assert tab.complaints == []


def test_not_sure_recent_ones_and_the_report(browser: Any, server: Server) -> None:
    tab = Tab(browser, server)
    both = images(server)
    tab.give("sure.png", both[True], PASTE)
    label = tab.text("#label")
    tab.give("unsure.png", both[False])
    assert tab.text("#verdict") == "Not sure"
    assert "sure from 60" in tab.text("#confidence")
    assert "Not sure" in tab.page.text_content("#status"), "and a screen reader is told"
    tab.page.locator("#thumbs button").nth(1).press("Enter")
    assert (tab.text("#label"), tab.text("#verdict"), tab.text("#file")) == (label, "Confident", "sure.png")
    assert tab.page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
    assert tab.text("#name") == "my <run>"
    tab.page.click("#report")
    assert tab.text("p") == "the report"
    assert tab.complaints == []


def test_what_cannot_be_read_is_said_and_the_page_goes_on(browser: Any, server: Server) -> None:
    tab = Tab(browser, server)
    tab.page.evaluate(DROP, [["notes <b>.txt", "text/plain", [1, 2, 3]]])
    tab.page.wait_for_selector("#problem:not([hidden])")
    assert "cannot be read as an image" in tab.text("#problem")
    assert "notes <b>.txt: not an image" in tab.text("#problem")
    tab.page.set_input_files("#choose", {"name": "big.png", "mimeType": "image/png", "buffer": bytes((1 << 20) + 1)})
    until(tab.page, "document.getElementById('problems').textContent.includes('too large')")
    assert "notes" not in tab.text("#problem"), "what was wrong before is over"
    tab.give("good.png", image())
    assert tab.page.locator("#problem").is_hidden()


def test_of_several_files_those_that_failed_and_those_left_out_are_told_after_the_others_went_well(browser: Any, server: Server) -> None:
    tab = Tab(browser, server)
    files = [["a.txt", "text/plain", [1]], *([f"{i}.png", "image/png", list(image(i))] for i in range(9)), ["b.txt", "text/plain", [1]]]
    tab.page.evaluate(DROP, files)
    until(tab.page, IDLE)
    assert "of these 11 the last 3 are left out" in tab.text("#problem")
    assert "a.txt: not an image" in tab.text("#problem")
    assert tab.page.locator("#again").is_hidden(), "it would fail again"
    assert tab.text("#file") == "6.png"
    tab.page.evaluate(DROP, [])
    assert tab.page.locator("#problem").is_visible(), "nothing was given"


def test_what_failed_for_the_server_alone_can_be_tried_again(browser: Any, server: Server) -> None:
    tab = Tab(browser, server)
    tab.page.route("**/predict*", lambda route: route.fulfill(status=503, json={"status": 503, "title": "Busy", "detail": "later"}), times=2)
    tab.page.evaluate(DROP, [[f"{i}.png", "image/png", list(image(i))] for i in range(3)])
    until(tab.page, IDLE)
    assert tab.text("#problem").split("\n")[-1] == "Try again"
    assert ("0.png: later" in tab.text("#problem"), "1.png: later" in tab.text("#problem"), tab.text("#file")) == (True, True, "2.png")
    tab.page.click("#again")
    until(tab.page, f"{IDLE} && document.getElementById('file').textContent === '1.png'")
    assert tab.page.locator("#thumbs li").count() == 3
    assert tab.page.locator("#problem").is_hidden()


@pytest.mark.parametrize(
    ("probability", "threshold", "told"),
    [
        (0.826, 0.834, ("82.6", "83.4")),
        (0.9963, 0.9961, ("99.63", "99.61")),
        (0.5, 0.75, ("50", "75")),
        (0.9, 0.9, ("90", "90")),
        (0.9996, 0.75, ("> 99", "75")),
        (0.9999, 0.99951, ("99.99", "99.95")),
    ],
)
def test_a_probability_and_the_threshold_never_look_alike(browser: Any, server: Server, probability: float, threshold: float, told: tuple[str, str]) -> None:
    tab = Tab(browser, server)
    one = {"label": "blue", "probability": probability, "sure": probability >= threshold, "top": [{"label": "blue", "probability": probability}]}
    tab.page.route("**/predict*", lambda route: route.fulfill(json={"predictions": [one], "sure_from": threshold}))
    tab.give("a.png", image())
    assert tuple(re.findall(r"((?:> )?[\d.]+)\s%", tab.text("#confidence"))) == told


def test_it_is_seen_that_the_first_image_is_being_looked_at(browser: Any, server: Server) -> None:
    tab = Tab(browser, server)
    tab.page.route("**/predict*", lambda route: None)  # no answer comes
    tab.page.evaluate(DROP, [["a.png", "image/png", list(image())], ["b.png", "image/png", list(image(1))]])
    until(tab.page, "document.getElementById('status').textContent")
    assert tab.text("#status") == "Looking at the image, 1 more to come"
    box = tab.page.locator("#status").bounding_box()
    assert box["width"] > 100 and box["height"] > 20
    other = Tab(browser, server)
    other.give("a.png", image())
    assert other.page.locator("#status").bounding_box()["width"] <= 1, "the answer is told to the ear alone"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_axe_finds_no_violation(browser: Any, server: Server, scheme: str, width: int) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not at hand: `npm install axe-core`, or set RESLAB_AXE to its axe.min.js")
    tab = Tab(browser, server, color_scheme=scheme, viewport={"width": width, "height": 800}, bypass_csp=True, reduced_motion="reduce")
    tab.page.add_script_tag(path=str(AXE))
    both = images(server)
    for give in (None, both[True], both[False]):
        if give:
            tab.give(f"{give[20:22].hex()}.png", give)
        violations = tab.page.evaluate("axe.run().then(found => found.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")
        assert violations == []
    tab.page.evaluate(DROP, [["x.txt", "text/plain", [1]], ["y.txt", "text/plain", [1]]])
    until(tab.page, IDLE)
    assert tab.page.evaluate("axe.run().then(found => found.violations.map(v => v.id))") == []
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing may stick out"


def test_it_is_all_reachable_by_keyboard(browser: Any, server: Server) -> None:
    tab = Tab(browser, server)
    tab.give("a.png", image(0))
    tab.give("b.png", image(1))
    reached = []
    for _ in range(12):
        tab.page.keyboard.press("Tab")
        reached.append(tab.page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"report", "choose", "opacity", "BUTTON"} <= set(reached), reached


def test_first_paint_is_fast(browser: Any, server: Server) -> None:
    times = []
    for _ in range(3):
        tab = Tab(browser, server)
        painted = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
        times.append(until(tab.page, painted))
    print(f"first contentful paint: {sorted(times)} ms", file=sys.stderr)
    assert min(times) < FIRST_PAINT


def test_the_first_paint_does_not_wait_for_the_script(browser: Any, server: Server) -> None:
    page = browser.new_context().new_page()
    page.route("**/page.js", lambda route: None)  # it never comes, and so nobody asks for the model either
    page.goto(f"http://127.0.0.1:{server.port}/", wait_until="commit")
    until(page, "performance.getEntriesByName('first-contentful-paint').length")
    assert "What is in the picture?" in page.inner_text("#zone")
