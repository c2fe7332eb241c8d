import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import reslab
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.run import Run
from tests.conftest import COLOURS, draw
from tests.data.test_decode import bomb
from tests.use.conftest import TINY, classifier_of


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "photos"
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(30):
            draw(root / name / f"{i}.png", colour, 100 * c + i)
    return root


@pytest.fixture(scope="module")
def run(photos: Path) -> Run:
    return reslab.train(photos, out=photos.parent / "run", epochs=12, seed=1, precision="fp32")  # in bf16 its test would be, too


def test_a_folder_of_photos_becomes_a_classifier(run: Run, photos: Path) -> None:
    assert run.last("test")["top1"] > 0.8
    found = reslab.load(run.path).predict([photos / "red" / "3.png", str(photos / "blue" / "4.png")])
    assert [p.label for p in found] == ["red", "blue"]
    assert found[0].top[0] == ("red", found[0].probability)
    assert sum(p for _, p in found[0].top) == pytest.approx(1, abs=1e-5)


def test_artefact_gives_the_training_time_logits_bit_for_bit_in_another_process(run: Run, photos: Path, tmp_path: Path) -> None:
    """The probabilities recorded at the test, and logits from a fresh process that has only a copy of model/."""
    images = split(open_images(photos), 1)
    pixels = np.stack([images.pixels(int(i), 24) for i in images.split["test"]])
    np.save(tmp_path / "pixels.npy", pixels)
    shutil.copytree(run.model, tmp_path / "elsewhere")
    code = "import sys, numpy, reslab\nclf = reslab.load(sys.argv[1])\nnumpy.save(sys.argv[3], clf.logits(numpy.load(sys.argv[2])))"
    subprocess.run([sys.executable, "-c", code, tmp_path / "elsewhere", tmp_path / "pixels.npy", tmp_path / "logits.npy"], check=True, cwd=tmp_path)
    theirs = np.load(tmp_path / "logits.npy")
    ours = reslab.load(run.path).logits(pixels)
    assert np.array_equal(ours, theirs)
    labels = images.labels[images.split["test"]]
    scaled = torch.from_numpy(theirs).double() / reslab.load(run.path).temperature
    assert torch.nn.functional.cross_entropy(scaled, torch.from_numpy(labels)).item() == pytest.approx(run.last("test")["loss"], rel=1e-12)


def test_predict_reports_what_it_cannot_read_and_does_the_rest(run: Run, photos: Path, cli: Callable, tmp_path: Path) -> None:
    shutil.copytree(photos / "red", tmp_path / "new folder")
    (tmp_path / "new folder" / "text 🦊.jpg").write_text("no image")
    (tmp_path / "new folder" / "bomb.png").write_bytes(bomb(50_000, 50_000))
    done = cli("predict", run.path, tmp_path / "new folder", photos / "blue" / "*.png", tmp_path / "none.jpg", "--json")
    assert done.returncode == 1, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 30 + 2 + 30 + 1
    errors = {Path(row["image"]).name: row["error"] for row in rows if "error" in row}
    assert set(errors) == {"text 🦊.jpg", "bomb.png", "none.jpg"}
    assert sum(row.get("label") == "blue" for row in rows) > 24
    good = cli("predict", run.path, photos / "red" / "1.png")
    assert (good.returncode, "red" in good.stdout, good.stderr) == (0, True, "")


def test_a_pattern_that_matches_nothing_is_reported(run: Run, photos: Path, cli: Callable) -> None:
    done = cli("predict", run.path, photos / "red" / "1.png", "no such*.png", "--json")
    assert done.returncode == 1
    assert [row.get("label", row.get("error")) for row in json.loads(done.stdout)] == ["red", "No such file or directory"]


def test_predict_api_names_the_unreadable_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(reslab.WorkError, match=r"x\.png is not: empty file"):
        reslab.load(run.path).predict([tmp_path / "x.png"])


def test_evaluate_repeats_the_test_and_scores_other_data(run: Run, photos: Path, cli: Callable, tmp_path: Path) -> None:
    again = cli("evaluate", run.path, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["top1"] == run.last("test")["top1"]
    for i in range(6):
        draw(tmp_path / "other" / "red" / f"{i}.png", COLOURS["red"], 5000 + i)
    other = json.loads(cli("evaluate", run.path, tmp_path / "other", "--json").stdout)
    assert {row["class"]: row["n"] for row in other["classes"]} == {"blue": 0, "green": 0, "red": 6}, "alone, it is the first of its folder's classes"
    assert other["top1"] > 0.8 and other["learned"] == 0
    (tmp_path / "other" / "red" / "bad.png").write_bytes(b"no image")
    fewer = json.loads(cli("evaluate", run.path, tmp_path / "other", "--json").stdout)
    assert (other["left_out"], fewer["left_out"], fewer["n"]) == (0, 1, 6)
    assert fewer["first_left_out"] == "red/bad.png (not an image of a known format)"
    own = cli("evaluate", run.path, photos)
    split = json.loads((run.path / "split.json").read_text())
    assert f"{len(split['train']) + len(split['val'])} of these images are those it was trained on or chosen by" in own.stdout
    (tmp_path / "other" / "red").rename(tmp_path / "other" / "bleu")
    log = run.path / "log.jsonl"
    log.rename(run.path / "log.away")
    log.mkdir()  # where nothing can be written
    kept = cli("evaluate", run.path, photos)
    log.rmdir()
    (run.path / "log.away").rename(log)
    assert (kept.returncode, "top-1" in kept.stdout, "not recorded: " in kept.stdout) == (0, True, True)
    wrong = cli("evaluate", run.path, tmp_path / "other")
    assert (wrong.returncode, "unknown class 'bleu': did you mean 'blue'" in wrong.stderr) == (2, True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "spec.json").write_text("{"), "cannot be read"),
        (
            lambda m: (m / "spec.json").write_text('{"block": "basic", "depths": [1000000000], "widths": [1], "stem": "conv3"}'),
            "is damaged",
        ),
        (lambda m: (m / "classes.json").write_text('["a"]'), "1 class names, 3 outputs"),
        (lambda m: (m / "weights.safetensors").write_bytes(b"\xff" * 100), "cannot be read as weights"),
        (lambda m: (m / "preprocess.json").write_text("{}"), "preprocessing"),
        (lambda m: (m / "calibration.json").write_text('{"temperature": 0}'), "temperature 0"),
    ],
)
def test_a_damaged_artefact_is_one_line(run: Run, damage: Callable, message: str, tmp_path: Path) -> None:
    shutil.copytree(run.model, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(reslab.WorkError, match=message) as caught:
        reslab.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_no_pickle_is_written(run: Run) -> None:
    for file in run.path.rglob("*"):
        if file.is_file():
            head = file.read_bytes()[:2]
            assert head != b"PK", f"{file} is a zip, as torch.save writes"
            assert head[:1] != b"\x80", f"{file} is a pickle"


def test_probabilities_are_calibrated() -> None:
    classifier = classifier_of(TINY)
    frame = classifier.preprocess
    pixels = np.random.default_rng(0).integers(0, 256, (4, frame.canvas, frame.canvas, frame.channels), dtype=np.uint8)
    scaled = np.exp(classifier.logits(pixels).astype(float) / 1.3)
    assert classifier.temperature == 1.3
    assert [found.probability for found in classifier.predict_pixels(list(pixels))] == pytest.approx((scaled / scaled.sum(1, keepdims=True)).max(1), abs=1e-4)
