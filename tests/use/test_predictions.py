"""Very many images: read as they are answered, in order, and written whole or not at all."""

import csv
import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import reslab
from reslab.data import folder as folders
from reslab.data.folder import image_paths
from reslab.data.given import image_files
from reslab.run import Run
from reslab.use.classifier import AHEAD, BATCH, Prediction
from reslab.use.predictions import write_file
from tests.use.conftest import photos_of

Here = Callable[..., subprocess.CompletedProcess[str]]


def test_what_cannot_be_looked_at_is_a_row_with_the_reason(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo, closed = next(image_paths(photos_of(trained))), tmp_path / "closed"
    closed.mkdir()
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    named = image_files((str(photo), "x" * 300, str(closed)), "predict")
    assert write_file(reslab.load(trained.path).predict_each(named), tmp_path / "rows.csv") == (3, 2)
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == [str(photo), "x" * 300, str(closed)]
    assert [row["error"] for row in rows] == ["", "File name too long", "Is a directory"]


def test_answers_are_in_order_and_paths_are_read_as_needed(trained: Run) -> None:
    classifier, taken = reslab.load(trained.path), 0
    photos = list(image_paths(photos_of(trained)))
    assert len(photos) == 90

    def many() -> Iterator[Path]:
        nonlocal taken
        for i in range(2000):
            taken += 1
            yield Path("none.png") if i == 70 else photos[i % 90]

    answers = classifier.predict_each(many())
    first = [next(answers) for _ in range(100)]
    assert taken <= (2 + AHEAD) * BATCH
    assert [path for path, _ in first] == [Path("none.png") if i == 70 else photos[i % 90] for i in range(100)]
    assert [isinstance(found, str) for _, found in first] == [i == 70 for i in range(100)]
    alone = [classifier.predict([photos[i]])[0].label for i in (0, 45, 89)]
    assert [first[i][1].label for i in (0, 45, 89)] == alone  # type: ignore[union-attr]
    answers.close()  # type: ignore[attr-defined]


def test_a_folder_is_read_in_natural_order_files_before_folders(tmp_path: Path) -> None:
    for name in ("10.png", "9.png", "b/1.png", "a/2.png", "a/c/0.png", ".hidden/1.png", "a/.x.png", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "out.png").symlink_to("/etc/hostname")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path / "in").as_posix() for path in image_paths(tmp_path / "in")]
    assert found == ["9.png", "10.png", "a/2.png", "a/c/0.png", "b/1.png"]


def test_a_large_folder_is_read_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "RUN", 16)
    for i in range(100):
        (tmp_path / f"{i}.png").touch()
    listed = [entry.name for entry in os.scandir(tmp_path)]
    found = [path.name for path in image_paths(tmp_path)]
    assert found[:16] == sorted(listed[:16], key=lambda name: int(name[:-4]))
    assert sorted(found) == sorted(listed)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_out_has_a_row_an_image(kind: str, trained: Run, here: Here, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    odd = os.fsencode(tmp_path / "odd") + b"/\xff,\n.png"
    Path(os.fsdecode(odd)).write_text("no image")
    out = tmp_path / "new" / f"predictions.{kind}"
    done = here("predict", trained.path, photos_of(trained), tmp_path / "odd", "--out", out)
    assert done.returncode == 1
    assert "91 images, 1 of them could not be read" in done.stdout
    with out.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        rows = list(csv.DictReader(stream)) if kind == "csv" else [json.loads(line) for line in stream]
    assert [row["image"] for row in rows] == [*map(str, image_paths(photos_of(trained))), os.fsdecode(odd)]
    assert {row["label"] for row in rows[:90]} <= {"red", "green", "blue"}
    assert all(0 < float(row["probability"]) <= 1 for row in rows[:90])
    assert rows[90]["error"] == "not an image of a known format"
    assert [file.name for file in out.parent.iterdir()] == [out.name]


def test_a_label_that_is_no_text_is_escaped_and_loses_no_row(tmp_path: Path) -> None:
    found = Prediction("half \ud800", 0.5, [("half \ud800", 0.5)])
    assert write_file([(Path("a.png"), found), (Path("b.png"), found._replace(label="über"))], tmp_path / "out.csv") == (2, 0)
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text("utf-8").splitlines()))
    assert [row["label"] for row in rows] == ["half \\ud800", "über"]


def test_a_pattern_gives_no_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").touch()
    assert list(image_files((str(tmp_path / "*"),), "predict")) == [tmp_path / "a.png"]


def test_a_pipe_and_a_file_beyond_all_bounds_are_rows_with_the_reason(trained: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "sparse.png").open("wb") as huge:
        huge.truncate(1 << 40)
    photo = next(image_paths(photos_of(trained)))
    found = dict(reslab.load(trained.path).predict_each([tmp_path / "pipe.png", tmp_path / "sparse.png", photo]))
    assert list(found.values())[:2] == ["not a regular file", "1,099,511,627,776 bytes: the limit is 256 MiB"]
    assert isinstance(found[photo], Prediction)


def test_a_file_that_breaks_off_is_not_left(tmp_path: Path) -> None:
    def answers() -> Iterator[tuple[Path, Prediction | str]]:
        yield Path("a.png"), "no image"
        raise reslab.WorkError("the power went out")

    (tmp_path / "out.csv").write_text("before")
    with pytest.raises(reslab.WorkError, match="power"):
        write_file(answers(), tmp_path / "out.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["out.csv"]
    assert (tmp_path / "out.csv").read_text() == "before"


def test_json_is_valid_and_names_that_are_no_files_are_refused(trained: Run, here: Here, tmp_path: Path) -> None:
    done = here("predict", trained.path, photos_of(trained) / "red", "--json")
    assert len(json.loads(done.stdout)) == 30
    told = here("predict", trained.path, photos_of(trained) / "red", "--out", tmp_path / "x.jsonl", "--json")
    assert json.loads(told.stdout) == {"out": str(tmp_path / "x.jsonl"), "images": 30, "errors": 0}
    wrong = here("predict", trained.path, photos_of(trained), "--out", tmp_path / "x.xlsx")
    assert (wrong.returncode, "ends in .csv or .jsonl" in wrong.stderr) == (2, True)


def test_a_link_stays_a_link_and_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "kept" / "rows.txt")
    assert write_file([(Path("a.png"), "no image")], tmp_path / "link.csv") == (1, 1)
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "kept" / "rows.txt").read_text().splitlines() == ["image,label,probability,error", "a.png,,,no image"]
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(reslab.CallError, match="must be a regular file"):
        write_file([], tmp_path / "pipe.csv")
