"""`reslab export`: what is checked, what is stored, what is refused, and that nothing unchecked is left."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import reslab
from reslab.run import Run
from reslab.use import export as exporting
from reslab.use.export import export, in_words
from reslab.use.formats import FORMATS, Format, write_onnx
from tests.test_cli import one_line


@pytest.fixture
def copied(trained: Run, tmp_path: Path) -> Path:
    """A run whose folder a test may write to; its data are where they were."""
    shutil.copytree(trained.path, tmp_path / "run")
    return tmp_path / "run"


def test_export_compares_on_the_val_images_and_stores_what_it_found(copied: Path, here: Callable) -> None:
    done = here("export", copied, "--to", "onnx")
    assert done.returncode == 0, done.stderr
    file = copied / "export" / "model.onnx"
    facts = json.loads((copied / "export" / "model.onnx.json").read_text())
    val = Run(copied).last("calibration")
    assert (facts["parity"]["images"], facts["parity"]["n"]) == ("val", val["n"])
    assert facts["parity"]["top1"] == facts["parity"]["top1_net"] == val["top1"]
    assert (facts["parity"]["agreement"], facts["parity"]["tolerance"]) == (1.0, 1e-4)
    assert facts["bytes"] == file.stat().st_size
    for part in (f"parity on {val['n']} val images", "top-1 agrees on 100.00%", f"val top-1 {val['top1']:.2%} (95 % interval", str(file)):
        assert part in done.stdout
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.onnx", "model.onnx.json"]


def test_without_the_data_random_images_are_compared_and_the_reason_is_kept(copied: Path, trained: Run, tmp_path: Path) -> None:
    config = (copied / "run.toml").read_text()
    (copied / "run.toml").write_text(config.replace(str(trained.path.parent / "photos"), str(tmp_path / "moved away")))
    said: list[str] = []
    found = export(copied, "torch", tmp_path / "x.pt2", say=said.append)
    assert (found.facts["parity"]["images"], found.facts["parity"]["n"]) == ("random", 256)
    assert "moved away" in found.facts["parity"]["why"]
    assert "moved away" in said[0]
    assert "top1" not in found.facts["parity"]
    assert not any("val top-1" in line for line in in_words(found))
    with pytest.raises(reslab.WorkError, match="int8 is judged on the run's own images"):
        export(copied, "onnx", tmp_path / "x.onnx", precision="int8")
    only = export(copied / "model", "torch", tmp_path / "y.pt2")
    assert "no run.toml" in only.facts["parity"]["why"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x.pt2", "x.pt2.json", "y.pt2", "y.pt2.json"]


def test_changed_data_are_not_taken_for_the_runs_own(copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = (copied / "run.toml").read_text()
    fingerprint = Run(copied).config["data"]["fingerprint"]
    (copied / "run.toml").write_text(config.replace(fingerprint, fingerprint[::-1]))
    found = export(copied, "torch", tmp_path / "x.pt2")
    assert found.facts["parity"]["images"] == "random"
    assert "has changed" in found.facts["parity"]["why"]


def test_a_file_that_answers_otherwise_is_not_left_behind(copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def off_by_a_little(path: Path) -> Callable:
        run = FORMATS["torch"].open(path)
        return lambda pixels: (run(pixels)[0] + np.float32(2e-4), run(pixels)[1])

    monkeypatch.setitem(exporting.FORMATS, "wrong", Format(".pt2", FORMATS["torch"].write, off_by_a_little))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.pt2").write_bytes(b"an earlier one")
    with pytest.raises(reslab.WorkError, match="it is not kept"):
        export(copied, "wrong", tmp_path / "out" / "model.pt2")
    with pytest.raises(reslab.WorkError, match="it is not kept"):
        export(copied, "wrong", tmp_path / "out" / "other.pt2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.pt2"]
    assert (tmp_path / "out" / "model.pt2").read_bytes() == b"an earlier one"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--to", "onxx"], "did you mean 'onnx'"),
        (["--to", "torch", "--int8"], "--int8 is for --to onnx or openvino"),
        (["--to", "openvino", "--bf16"], "--bf16 is for --to onnx;"),
        (["--to", "onnx", "--int8", "--bf16"], "exclude each other"),
        (["--to", "onnx", "--push", "a/b"], "give --to card"),
        (["--to", "card", "--int8"], "received --to card"),
        (["--to", "onnx", "--out", "x.pt2"], "ends in .onnx"),
        (["--to", "onnx", "--max-drop", "101"], "from 0 to 100 points"),
        ([], "--to"),
    ],
    ids=" ".join,
)
def test_wrong_calls_are_one_line(trained: Run, here: Callable, arguments: list[str], part: str) -> None:
    one_line(here("export", trained.path, *arguments), 2, part)


def test_what_is_no_run_or_not_torch_is_a_wrong_call(copied: Path, here: Callable, tmp_path: Path) -> None:
    one_line(here("export", tmp_path / "none", "--to", "onnx"), 2, "a finished run has model/spec.json")
    write_onnx(reslab.load(copied), tmp_path / "model.onnx")
    one_line(here("export", tmp_path / "model.onnx", "--to", "torch"), 2, "give the run folder")


@pytest.mark.parametrize(("module", "to", "extra"), [("onnx", "onnx", "export"), ("onnxscript", "onnx", "export"), ("openvino", "openvino", "openvino")])
def test_a_missing_extra_is_named(copied: Path, here: Callable, monkeypatch: pytest.MonkeyPatch, module: str, to: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    one_line(here("export", copied, "--to", to), 1, f"pip install 'reslab[{extra}]'")
    assert not list((copied / "export").iterdir())


def test_where_nothing_can_be_written_it_is_one_line(copied: Path, here: Callable) -> None:
    one_line(here("export", copied, "--to", "torch", "--out", "/proc/model.pt2"), 1, "cannot be written")
