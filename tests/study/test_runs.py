"""Studies of trained runs: what a run must be, and that it stays as it is."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import reslab
from reslab.cli import main
from reslab.run import Run
from reslab.spec import Spec
from reslab.studies import _named, _of_runs
from tests.conftest import COLOURS, draw


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on 45 images that lie in ../photos."""
    root = tmp_path_factory.mktemp("trained")
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(15):
            draw(root / "photos" / name / f"{i}.png", colour, 100 * c + i)
    return reslab.train(root / "photos", net=Spec("basic", (2, 1), (8, 16), "conv3"), out=root / "run", epochs=2, seed=1)


@pytest.fixture
def copied(trained: Run, tmp_path: Path) -> Path:
    """The run, to be damaged."""
    return Path(shutil.copytree(trained.path, tmp_path / "run"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit status and the one line that a refused study prints."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["study", *map(str, arguments)])
        line = capsys.readouterr().err
        assert line.count("\n") == 1, line
        assert isinstance(ended.value.code, int)
        return ended.value.code, line

    return call


def _config(run: Path, old: str, new: str) -> None:
    file = run / "run.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("study", ["lesion", "estimation"])
def test_a_run_whose_data_is_gone_is_one_line(study: str, trained: Run, copied: Path, tmp_path: Path, refused: Callable[..., tuple[int, str]]) -> None:
    _config(copied, str(trained.path.parent / "photos"), str(tmp_path / "no photos"))
    status, line = refused(study, copied, "--budget", "10s", "--out", tmp_path / "s")
    assert (status, "is gone: move it back" in line) == (1, True)
    assert not (tmp_path / "s").exists(), "nothing is written"


def test_a_run_whose_data_has_changed_is_one_line(trained: Run, copied: Path, tmp_path: Path, refused: Callable[..., tuple[int, str]]) -> None:
    photos = Path(shutil.copytree(trained.path.parent / "photos", tmp_path / "photos"))
    (photos / "red" / "0.png").unlink()
    _config(copied, str(trained.path.parent / "photos"), str(photos))
    status, line = refused("lesion", copied, "--budget", "10s", "--out", tmp_path / "s")
    assert (status, "has changed since: restore it" in line) == (1, True)


def test_what_is_no_finished_run_is_one_line(copied: Path, tmp_path: Path, refused: Callable[..., tuple[int, str]]) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "empty"):
        status, line = refused("lesion", tmp_path / path, "--budget", "10s")
        assert (status, path in line) == (2, True), line
    (copied / "model" / "spec.json").unlink()
    status, line = refused("lesion", copied, "--budget", "10s")
    assert (status, "finish it with" in line) == (2, True)


def test_an_exported_file_has_no_blocks_to_look_at() -> None:
    exported = reslab.Classifier(object(), ("a", "b"))  # type: ignore[arg-type]
    with pytest.raises(reslab.CallError, match=r"only its graph; received net\.onnx"):
        _of_runs((Path("net.onnx"),), [exported], None)  # type: ignore[arg-type]


def test_runs_on_other_images_are_not_compared(trained: Run, tmp_path: Path, refused: Callable[..., tuple[int, str]]) -> None:
    other = reslab.train("digits", net=Spec("basic", (1,), (8,), "conv3"), out=tmp_path / "digits", epochs=1)
    status, line = refused("lesion", trained.path, other.path, "--budget", "10s")
    assert (status, "study them one by one" in line) == (2, True)


def test_a_net_without_shortcuts_has_no_residual_twin_to_train(tmp_path: Path, refused: Callable[..., tuple[int, str]]) -> None:
    for study in ("lesion", "estimation"):
        status, line = refused(study, "--data", "digits", "--net", "plain20", "--budget", "10s", "--out", tmp_path / study)
        assert (status, "name the residual net" in line) == (2, True)


def test_runs_of_one_name_are_told_apart_by_their_paths() -> None:
    runs = (Path("a/run"), Path("b/run"), Path("c/other"))
    assert [_named(path, runs) for path in runs] == ["a/run", "b/run", "other"]


def test_a_run_is_studied_and_stays_as_it_is(trained: Run, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    def prints() -> dict[str, str]:
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(trained.path.rglob("*")) if file.is_file()}

    before = prints()
    with pytest.raises(SystemExit) as ended:
        main(["study", "lesion", str(trained.path), "--budget", "8s", "--jobs", "1", "--out", str(tmp_path / "s")])
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    assert prints() == before
    rows = [json.loads(line) for file in (tmp_path / "s" / "cells").iterdir() for line in file.read_text().splitlines()]
    assert {"removed", "median"} <= {r["kind"] for r in rows}
    assert {r["block"] for r in rows if r["kind"] == "removed"} == {"layer1.0", "layer1.1", "layer2.0"}
    assert "barely noticed" in (tmp_path / "s" / "study.html").read_text()
    protocol = json.loads((tmp_path / "s" / "study.json").read_text())["protocol"]
    assert protocol.startswith("A budget of 0.133333 min.")
    assert "longer trainings" not in protocol
