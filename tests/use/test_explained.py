"""`reslab explain` and `reslab features` as a person uses them, and where on an image its heat is drawn."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reslab
from reslab.cli import main
from reslab.data.decode import decode, decode_whole
from reslab.data.preprocess import Frame, Preprocess
from reslab.nets.torch import ResNet
from reslab.report.page import write_report
from reslab.run import Run
from reslab.spec import Spec
from reslab.use.artefact import TorchModel, save
from reslab.use.classifier import Classifier
from reslab.use.explained import explain_files
from reslab.use.overlay import overlay, seen_box
from tests.conftest import COLOURS, draw, scramble
from tests.report.test_page import Tags
from tests.test_cli import one_line

EVIL = "<b>&'x' 🦊"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "photos"
    for c, (name, colour) in enumerate({"red": COLOURS["red"], "rose": COLOURS["red"], EVIL: COLOURS["blue"]}.items()):
        for i in range(24):
            draw(root / name / f"{i}.png", colour, 100 * c + i)
    return root


@pytest.fixture(scope="module")
def run(photos: Path) -> Run:
    return reslab.train(photos, out=photos.parent / "run", epochs=3, seed=1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As the fixture `cli`, without the seconds that a new process needs to import torch."""
    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in arguments])
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), *capsys.readouterr())

    return call


def grey_model(folder: Path) -> Path:
    spec = Spec("basic", (1, 1), (8, 16), "conv3", "none", in_channels=1, num_classes=2)
    preprocess = Preprocess(28, 32, 1, np.array([0.5], np.float32), np.array([0.3], np.float32))
    save(Classifier(TorchModel(scramble(ResNet(spec)).eval(), preprocess), ("even", "odd")), folder)  # type: ignore[arg-type]
    return folder


def test_overlays_have_their_images_resolution_and_own_names_and_a_bad_file_stops_nothing(run: Run, photos: Path, cli: Callable, tmp_path: Path) -> None:
    draw(tmp_path / "a" / "Same.png", COLOURS["red"], 1, (90, 60))
    draw(tmp_path / "b" / "same.jpg", COLOURS["red"], 2, (1500, 1000))
    turned = Image.open(tmp_path / "b" / "same.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "b" / "same.jpg", exif=exif)
    (tmp_path / "b" / "broken.jpg").write_text("no image")
    done = cli("explain", run.path, tmp_path / "a", tmp_path / "b", tmp_path / "none.png", "--json")
    assert done.returncode == 1, done.stderr
    facts = json.loads(done.stdout)
    rows = {Path(row["image"]).name: row for row in facts["images"]}
    assert {name: "error" in row for name, row in rows.items()} == {"Same.png": False, "same.jpg": False, "broken.jpg": True, "none.png": True}
    out = tmp_path / "work" / "explain"
    assert {path.name for path in out.iterdir()} == {"Same.png", "same-2.png", "sheet.html"}
    with Image.open(out / "Same.png") as one, Image.open(out / "same-2.png") as two:
        assert (one.size, two.size) == ((90, 60), (1000, 1500))
    known = [row["rank_correlation"] for row in rows.values() if row.get("rank_correlation") is not None]
    assert all(-1 <= correlation <= 1 for correlation in known)
    assert facts["rank_correlation"] == (pytest.approx(np.mean(known)) if known else None)


def test_maps_of_which_one_is_the_same_everywhere_are_no_evidence(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reslab.use.explained.rank_correlation", lambda maps, others, magnitude: [None])
    found = explain_files(run.path, [photos / "red" / "1.png"], out=tmp_path / "out")
    assert (found.rank_correlation, found.depends_on_weights) == (None, None)
    assert json.loads(json.dumps(found.facts()))["depends_on_weights"] is None
    assert "Nothing to compare." in (tmp_path / "out" / "sheet.html").read_text("utf-8")


def test_nothing_is_overwritten(run: Run, photos: Path, here: Callable, tmp_path: Path) -> None:
    (tmp_path / "work" / "explain").mkdir()
    (tmp_path / "work" / "explain" / "1.png").write_bytes(b"precious")
    done = here("explain", run.path, photos / "red" / "1.png")
    assert done.returncode == 0, done.stderr
    assert "sheet: explain-2/sheet.html" in done.stdout
    one_line(here("explain", run.path, photos / "red" / "1.png", "--out", photos / "red"), 2, "--out must be a new or empty folder")
    assert (tmp_path / "work" / "explain" / "1.png").read_bytes() == b"precious"
    none = here("explain", run.path, tmp_path / "none.png", "--out", tmp_path / "never", "--json")
    assert (none.returncode, (tmp_path / "never").exists()) == (1, False)
    assert "rank_correlation" not in json.loads(none.stdout)


@pytest.mark.parametrize("method", ["grad-cam", "grad-cam++", "integrated-gradients", "occlusion"])
def test_a_grey_plain_net_is_explained_by_every_method(method: str, here: Callable, tmp_path: Path) -> None:
    draw(tmp_path / "a.png", COLOURS["red"], 1, (70, 40))
    done = here("explain", grey_model(tmp_path / "model"), tmp_path / "a.png", "--method", method, "--class", "odd", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "odd" in done.stdout
    assert "sanity: rank correlation" in done.stdout
    with Image.open(tmp_path / "out" / "a.png") as drawn:
        assert (drawn.size, drawn.mode) == ((70, 40), "RGB")


def test_wrong_calls_are_one_line_and_leave_nothing(run: Run, photos: Path, here: Callable, tmp_path: Path) -> None:
    image = photos / "red" / "1.png"
    for arguments, part in (
        (["--at", "layer9"], "unknown place 'layer9'"),
        (["--method", "gradcam"], "did you mean 'grad-cam'"),
        (["--class", "rde"], "did you mean 'red'"),
        (["--method", "occlusion", "--at", "stem"], "leave --at stem out"),
        (["--neighbours", "-1"], "--neighbours must be from 0"),
    ):
        one_line(here("explain", run.path, image, *arguments), 2, part)
    one_line(here("explain", run.path), 2, "explain needs image files")
    one_line(here("explain", run.model, image, "--neighbours", "2"), 2, "has no run.toml")
    one_line(here("features", run.path, image, "--out", "photo.jpg"), 2, "must be a file that ends in .npz")
    assert list((tmp_path / "work").iterdir()) == []


def test_the_nearest_training_image_of_a_training_image_is_itself(run: Run, photos: Path, here: Callable, tmp_path: Path) -> None:
    named = [name for _, name in json.loads((run.path / "split.json").read_text())["train"]][:3]
    done = here("explain", run.path, *(photos / name for name in named), "--neighbours", "40", "--json")
    assert done.returncode == 0, done.stderr
    for row, name in zip(json.loads(done.stdout)["images"], named, strict=True):
        similarities = [near["similarity"] for near in row["neighbours"]]
        assert len(similarities) == 40
        assert similarities == sorted(similarities, reverse=True)
        own = next(near["similarity"] for near in row["neighbours"] if near["name"] == name)
        assert own == pytest.approx(1, abs=1e-6)
        assert similarities[0] - own < 1e-6, "in another batch its features are rounded otherwise, and its twins are nearly as near"
    copied = tmp_path / "copied"
    shutil.copytree(run.path, copied)
    text = (copied / "run.toml").read_text("utf-8")
    (copied / "run.toml").write_text(re.sub(r'fingerprint = "..', 'fingerprint = "zz', text), "utf-8")
    one_line(here("explain", copied, photos / "red" / "1.png", "--neighbours", "2"), 1, "has changed since")
    (copied / "run.toml").write_text(text.replace(str(photos.resolve()), str(tmp_path / "gone")), "utf-8")
    one_line(here("explain", copied, photos / "red" / "1.png", "--neighbours", "2"), 1, "is gone")


def test_features_are_what_the_head_reads_and_load_without_pickle(run: Run, photos: Path, here: Callable, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no image")
    done = here("features", run.path, photos / EVIL, tmp_path / "broken.png", "--out", tmp_path / "f.npz", "--json")
    assert done.returncode == 1, done.stderr
    assert [row["image"] for row in json.loads(done.stdout)["errors"]] == [str(tmp_path / "broken.png")]
    with np.load(tmp_path / "f.npz", allow_pickle=False) as held:
        paths, found = held["paths"], held["features"]
    assert (found.dtype, found.shape, paths.dtype.kind) == (np.float32, (24, 64), "U")
    classifier = reslab.load(run.path)
    pixels = torch.from_numpy(np.stack([classifier.decode(Path(path).read_bytes()) for path in paths.tolist()]))
    logits = classifier.net.fc(torch.from_numpy(found)).detach()
    assert torch.allclose(logits, torch.from_numpy(classifier.logits(pixels.numpy())), atol=1e-5)
    none = here("features", run.path, tmp_path / "broken.png", "--out", tmp_path / "never.npz")
    assert (none.returncode, (tmp_path / "never.npz").exists()) == (1, False)


def test_the_sheet_needs_no_network_and_escapes_what_comes_from_outside(run: Run, here: Callable, tmp_path: Path) -> None:
    draw(tmp_path / "<script>alert(1)<⁄script>.png", COLOURS["blue"], 5)
    done = here("explain", run.path, tmp_path / "<script>alert(1)<⁄script>.png", "--class", EVIL, "--neighbours", "3")
    assert done.returncode == 0, done.stderr
    page = Tags()
    page.feed((tmp_path / "work" / "explain" / "sheet.html").read_text("utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>alert(1)<⁄script>" in page.text
    assert EVIL in page.text
    assert "rank correlation" in page.text
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert (attrs.get("src") or "data:image/").startswith("data:image/")
        if tag == "a":
            assert (tmp_path / "work" / "explain" / str(attrs["href"])).is_file()
    assert sum(tag == "img" for tag, _ in page.tags) == 3 + 3


def test_the_report_shows_what_spoke_for_its_worst_mistakes_and_old_runs_do_without(run: Run, tmp_path: Path) -> None:
    worst = [record for record in run.records("mistake") if record["why"] == "worst"]
    assert worst, "red and rose look the same"
    assert all(record["overlay"].startswith("data:image/jpeg;base64,") for record in worst)
    page = (run.path / "report.html").read_text("utf-8")
    assert worst[0]["overlay"] in page
    assert "Grad-CAM" in page
    copied = tmp_path / "old"
    shutil.copytree(run.path, copied)
    lines = [json.loads(line) for line in (copied / "log.jsonl").read_text().splitlines()]
    (copied / "log.jsonl").write_text("".join(json.dumps({k: v for k, v in line.items() if k != "overlay"}) + "\n" for line in lines))
    assert "Grad-CAM" not in write_report(Run(copied)).read_text("utf-8")


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (41, 97), (2000, 1400)])
@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_heat_lands_on_the_pixels_it_came_from(size: tuple[int, int], turned: int, kind: str, tmp_path: Path) -> None:
    """A spot in the file is found in what the net sees; heat there must be drawn on the spot in the whole image."""
    preprocess = Frame(56, 64, 3)
    middle, radius = (0.55 * size[0], 0.42 * size[1]), max(2, min(size) // 24)
    array = np.zeros((size[1], size[0], 3), np.uint8)
    array[int(middle[1]) - radius : int(middle[1]) + radius, int(middle[0]) - radius : int(middle[0]) + radius] = 255
    exif = Image.Exif()
    exif[0x0112] = turned
    Image.fromarray(array).save(tmp_path / "spot", kind, exif=exif)
    data = (tmp_path / "spot").read_bytes()
    canvas, whole = decode(data, 64, 3), decode_whole(data)
    heat = np.where(canvas.max(2) > 100, 1, 0).astype(np.float32)
    drawn = np.asarray(overlay(Image.fromarray(np.zeros_like(whole)), heat, preprocess)).astype(int).sum(2)
    spot, drawn_spot = (np.argwhere(a > 0.6 * a.max()).mean(0) for a in (whole.astype(int).sum(2), drawn))
    assert np.abs(spot - drawn_spot).max() <= 1 + min(size) / 64, "within a pixel of the canvas"


def test_what_the_net_does_not_see_is_darkened_and_the_rest_stays_visible() -> None:
    preprocess = Frame(56, 64, 3)
    image = Image.new("RGB", (160, 100), (200, 100, 50))
    left, top, right, bottom = seen_box(160, 100, preprocess)
    assert (left, top) == (36, 6)
    assert abs(right - 124) <= 1
    assert abs(bottom - 94) <= 1
    drawn = np.asarray(overlay(image, np.ones((64, 64), np.float32), preprocess)).astype(int)
    assert drawn[0, 0].tolist() == pytest.approx([90, 45, 22], abs=1)
    assert (drawn[50, 80] != drawn[0, 0]).all()
    checks = np.indices((100, 160)).sum(0)[..., None].repeat(3, 2) % 2 * 200
    shaded = np.asarray(overlay(Image.fromarray(checks.astype(np.uint8)), np.ones((64, 64), np.float32), preprocess)).astype(int)
    assert abs(shaded[50, 80] - shaded[50, 81]).min() > 30, "the image shows through the most heat"
    assert seen_box(1, 5000, preprocess)[2:] == (1, 2501)
    assert overlay(Image.new("RGB", (1, 5000)), np.ones((64, 64), np.float32), preprocess).size == (1, 5000)
