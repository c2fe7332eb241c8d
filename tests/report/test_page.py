import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from jinja2 import Environment, PackageLoader

import reslab
from reslab.report.charts import canvas, titled
from reslab.report.figures import _short, confusion, curves
from reslab.report.page import write_report
from reslab.run import SHIPPED, Run
from reslab.use.card import write_card
from tests.conftest import draw
from tests.serve.test_page import AXE

EVIL = "<script>alert('x')</script>&\"'$x_1$ 🦊\nnew"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Classes with hostile names, hard to tell apart, so that every section has something to show."""
    root = tmp_path_factory.mktemp("made") / "photos"
    for c, name in enumerate((EVIL.replace("/", "⁄"), "plain", "third")):
        for i in range(30):
            draw(root / name / f"{i} <b>&.png", (90 + 20 * c, 120, 120), 100 * c + i)
    return reslab.train(root, out=root.parent / "run", epochs=3, seed=2)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(run: Run) -> Tags:
    tags = Tags()
    tags.feed((run.path / "report.html").read_text("utf-8"))
    return tags


def test_names_from_outside_are_escaped(run: Run) -> None:
    page = parsed(run)
    assert not any(tag in ("script", "b") and "alert" in str(attrs) for tag, attrs in page.tags)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>alert('x')<⁄script>" in page.text
    assert " <b>&.png" in page.text


def test_page_needs_no_network_and_no_script(run: Run) -> None:
    page = parsed(run)
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href"):
            assert re.match(r"data:image/|#|$", attrs.get(name) or ""), attrs
    assert "url(http" not in (run.path / "report.html").read_text("utf-8")


def test_page_says_what_the_records_say(run: Run) -> None:
    text = " ".join(parsed(run).text.split())
    test = run.last("test")
    assert f"{100 * test['top1']:.1f} % of {test['n']} test images" in text
    assert run.config["command"] in text
    for heading in ("Repeat it", "How it learned", "What is taken for what", "Class by class", "Can its confidence be believed?", "Worst mistakes",
                    "Labels worth a second look", "The data", "Environment"):  # fmt: skip
        assert heading in text
    ids = [attrs["id"] for _, attrs in parsed(run).tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "ids must be unique on the page"


def test_report_is_drawn_from_records_alone(run: Run, cli: Callable, tmp_path: Path) -> None:
    before = (run.path / "report.html").read_text("utf-8")
    moved = tmp_path / "moved"
    shutil.copytree(run.path, moved)
    (moved / "report.html").unlink()
    done = cli("report", moved)
    assert (done.returncode, done.stdout.strip()) == (0, str(moved / "report.html"))
    assert (moved / "report.html").read_text("utf-8") == before


def test_val_is_said_to_have_chosen_the_epoch_only_where_it_did(run: Run, tmp_path: Path) -> None:
    last = Run(tmp_path / "last")
    shutil.copytree(run.path, last.path)
    config = last.path / "run.toml"
    assert 'keep = "best"' in config.read_text("utf-8")
    config.write_text(config.read_text("utf-8").replace('keep = "best"', 'keep = "last"'), "utf-8")
    write_report(last)
    assert "chose the epoch" in parsed(run).text
    assert "chose the epoch" not in parsed(last).text
    assert "set the temperature" in parsed(last).text


def test_the_page_says_why_the_training_loss_may_lie_above_that_of_val(run: Run, tmp_path: Path) -> None:
    smoothed = Run(tmp_path / "smoothed")
    shutil.copytree(run.path, smoothed.path)
    config = smoothed.path / "run.toml"
    config.write_text(config.read_text("utf-8").replace("label_smoothing = 0.0", "label_smoothing = 0.2"), "utf-8")
    write_report(smoothed)
    assert "measured on augmented images, with smoothed targets, so" in parsed(smoothed).text
    assert "measured on augmented images, so" in parsed(run).text


def with_test(run: Run, path: Path, **changes: object) -> Run:
    """A copy of the run whose test found something else."""
    shutil.copytree(run.path, path)
    Run(path).record(**{**(run.last("test") or {}), **changes})
    return Run(path)


def test_a_class_without_a_test_image_is_not_the_hardest(run: Run, tmp_path: Path) -> None:
    rows = (run.last("test") or {})["classes"]
    absent = {**rows[1], "n": 0, "f1": 0.0, "f1_low": 0.0, "f1_high": 1.0}
    found = {"classes": [{**rows[0], "f1": 0.5}, absent, {**rows[2], "f1": 0.25}], "confusion": [[0, 0, 9], [2, 0, 9]]}
    write_report(other := with_test(run, tmp_path / "run", **found))
    text = " ".join(parsed(other).text.split())
    assert "the hardest class is third, with an F1 of 25.0 %" in text
    assert re.search(r"F1 third.* plain0––– Can its", text), "last of the table, without a figure"
    assert "A dash: no test image" in text
    write_report(whole := with_test(run, tmp_path / "whole", classes=[{**row, "precision_low": 0.1} for row in rows]))
    assert "A dash: no test image" not in parsed(whole).text
    assert "Hardest first. Precision" in parsed(whole).text


def test_of_very_many_classes_the_page_says_how_many_it_lists(run: Run, tmp_path: Path) -> None:
    rows = (run.last("test") or {})["classes"]
    write_report(other := with_test(run, tmp_path / "run", classes=[*rows, *({**rows[0], "class": f"{i}"} for i in range(998))]))
    assert "Hardest first: 200 of 1,001 classes. Precision" in parsed(other).text


def test_a_rate_that_was_recorded_once_is_a_dot() -> None:
    one, many = (curves([], [], [{"step": step, "lr": 0.1} for step in range(count)]).count("<use") for count in (1, 5))
    assert one > many


def test_an_epoch_that_a_crash_repeated_counts_once(run: Run, tmp_path: Path) -> None:
    other = Run(shutil.copytree(run.path, tmp_path / "run"))
    lines = (other.path / "log.jsonl").read_text().splitlines(keepends=True)
    (other.path / "log.jsonl").write_text("".join(line * (1 + ('"kind": "epoch"' in line or '"kind": "val"' in line)) for line in lines))
    write_report(other)
    assert re.search(r"of epoch \d of 3,", parsed(other).text)


def test_counts_can_be_read_on_every_shade_of_the_confusion_matrix(run: Run, tmp_path: Path) -> None:
    """A contrast of 4.5 to 1 (WCAG 2.2, 1.4.3), light and dark, where all images of a class go to one cell."""
    write_report(other := with_test(run, tmp_path / "run", confusion=[[0, 0, 10], [1, 2, 10]]))
    cells = {attrs["style"] or "" for tag, attrs in parsed(other).tags if tag == "td" and "style" in attrs}
    mixes = {(found[1], float(found[2]) / 100) for cell in cells if (found := re.search(r"var\((.*?)\) ([\d.]+)%, transparent", cell))}
    assert {name for name, share in mixes if share > 0.3} == {"--first", "--second"}
    style = (Path(reslab.__file__).parent / "report" / "style.css").read_text("utf-8")
    light, dark = (dict(re.findall(r"(--\w+): (#\w{6})", part)) for part in style[: style.index("* {")].split("@media"))
    for colours in (light, dark):
        page, ink = (np.array([int(colours[name][i : i + 2], 16) for i in (1, 3, 5)]) for name in ("--page", "--ink"))
        for name, share in mixes:
            mixed = share * np.array([int(colours[name][i : i + 2], 16) for i in (1, 3, 5)]) + (1 - share) * page
            assert contrast(ink, mixed) >= 4.5, (name, share)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """WCAG's ratio of two sRGB colours, 0 to 255."""
    shares = np.array([one, other]) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    dark, light = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return float((light + 0.05) / (dark + 0.05))


def test_every_header_of_a_table_says_what_it_heads(run: Run) -> None:
    assert {attrs.get("scope") for tag, attrs in parsed(run).tags if tag == "th"} == {"col", "row"}
    study = (Path(reslab.__file__).parent / "report" / "study.html.j2").read_text("utf-8")
    assert study.count("<th ") == study.count('<th scope="col">') == 3 and "<th>" not in study


def test_nearly_all_is_not_all_and_a_class_that_was_never_called_has_no_precision(run: Run, tmp_path: Path) -> None:
    first, *others = ({**row, "precision_low": 0.1} for row in (run.last("test") or {})["classes"])
    never = {**first, "precision": 0.0, "precision_low": 0.0, "precision_high": 1.0}
    write_report(other := with_test(run, tmp_path / "run", top1=0.9996, classes=[never, *others]))
    text = " ".join(parsed(other).text.split())
    assert "> 99.9 % of" in text and "or none was called so" in text
    assert "by chance" in text


def test_unfinished_run_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "run.toml").touch()
    with pytest.raises(reslab.CallError, match="needs a finished run"):
        write_report(Run(tmp_path))


def test_of_a_run_that_kept_only_its_test_the_page_shows_no_training(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "resnet20-cifar10", tmp_path / "copied")
    run = Run(tmp_path / "copied")
    write_report(run)
    page = parsed(run).text
    assert "What is taken for what" in page and "How it learned" not in page and "0 steps" not in page


@pytest.mark.parametrize(("find", "put"), [('"confusion"', '"confused"'), ('"loss": ', '"loss": 1e999, "l": '), ('"n": ', '"n": "many", "m": ')])
def test_damaged_records_are_one_line(run: Run, find: str, put: str, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(run.path, damaged)
    log = damaged / "log.jsonl"
    log.write_text(log.read_text().replace(find, put))
    with pytest.raises(reslab.WorkError, match=r"records in .* are damaged") as caught:
        write_report(Run(damaged))
    assert "\n" not in str(caught.value)


def test_names_that_are_no_text_are_drawn_escaped() -> None:
    with canvas(1, 2.0) as c:
        titled(c.axes[0], os.fsdecode(b"caf\xe9 $x$\n2 layers"))
        assert c.axes[0].get_title(loc="left") == "caf\\udce9 \\$x\\$\n2 layers"
        c.drawn("it", [])
    assert _short(os.fsdecode(b"caf\xe9")) == r"caf\udce9"


def test_many_classes_become_a_map() -> None:
    classes = [f"class $ {i} <&>" for i in range(100)]
    svg = confusion([(i, (i * 7) % 100, 1 + i % 5) for i in range(100)] + [(i, i, 30) for i in range(100)], classes)
    root = ET.fromstring(svg)  # well-formed, so nothing of a name leaked into the markup
    assert "class $ 0 <&>" in "".join(root.itertext())
    assert "var(--first)" in svg
    assert "#040404" not in svg


def test_classes_in_any_script_are_drawn_without_a_warning() -> None:
    classes = [f"日本語 {i}" for i in range(21)]
    assert "日本語 20" in "".join(ET.fromstring(confusion([(0, 1, 1)], classes)).itertext())  # warnings are errors here


def test_figures_of_one_page_share_no_id_and_a_title_is_text() -> None:
    titles = ("Test error by the number of blocks", "Test error by the disorder of blocks", '"1 < 2" & \\1')
    found = []
    for title in titles:
        with canvas(1, 2.0) as c:
            titled(c.axes[0], "it")
            root = ET.fromstring(c.drawn(title, []).svg)
            assert root.get("aria-label") == title
            found += [each.get("id") for each in root.iter() if each.get("id")]
    assert len(found) == len(set(found)) > 0


@pytest.mark.parametrize("width", [390, 1200])
def test_page_shows_in_a_real_browser_without_a_complaint(run: Run, width: int, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium on this machine")
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run", "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000",
         f"--screenshot={shot}", (run.path / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    from PIL import Image

    with Image.open(shot) as image:
        assert image.width == width
        assert len(image.convert("RGB").resize((60, 200)).getcolors(12_000) or []) > 40, "the page must show something"


def study_page(path: Path) -> Path:
    """A study's page with a claim that is wider than a telephone."""
    claim = {"paper": "plain nets degrade with depth", "measured": "+1.0 points", "verdict": "agrees"}
    study = {"question": "?", "method": "m", "source": "s", "shows": "it", "limits": "all else", "expected": "none"}
    facts = {"name": "degradation", "data": "digits", "size": 8, "answer": "yes", "protocol": "2 min", "command": "reslab study", "cells": 1, "version": "0"}
    environment = Environment(loader=PackageLoader("reslab", "report"), autoescape=True)
    environment.filters["shown"] = str
    page = environment.get_template("study.html.j2").render(**facts, hardware="a CPU", running=False, claims=[claim], figures=[], study=study)
    path.write_text(page, "utf-8")
    return path


def test_axe_finds_no_violation_on_a_telephone(run: Run, tmp_path: Path) -> None:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program or not AXE.is_file():
        pytest.skip("no Chromium or no axe-core at hand: `npm install axe-core`, or set RESLAB_AXE to its axe.min.js")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    card = tmp_path / "card"
    write_card(run.path, card)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 800}, bypass_csp=True)
        for file in (run.path / "report.html", study_page(tmp_path / "study.html"), card / "card.html"):
            page.goto(file.as_uri())
            page.add_script_tag(path=str(AXE))
            found = page.evaluate("axe.run().then(found => found.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 90))]))")
            assert found == [], file.name
        browser.close()
