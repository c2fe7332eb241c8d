import subprocess
import sys
from pathlib import Path

import pytest

import reslab
from reslab import job
from reslab.job import Silent
from reslab.run import Run
from reslab.spec import Spec

TINY = Spec("basic", (1,), (8,), "conv3")
GIVEN = {"steps": 6, "batch_size": 8, "save_every": 0}


class Cut(Silent):
    def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt


def cut_short(folder: Path, out: Path) -> Run:
    with pytest.raises(KeyboardInterrupt):
        reslab.train(folder, TINY, out, show=Cut(), **GIVEN)
    return Run(out)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    return monkeypatch


@pytest.mark.parametrize("name", ["none", "mine"])
def test_a_run_started_again_by_its_torchrun_goes_on(folder: Path, torchrun: pytest.MonkeyPatch, name: str) -> None:
    torchrun.setenv("TORCHELASTIC_RUN_ID", name)
    run = cut_short(folder, folder.parent / "run")
    torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert reslab.train(folder, TINY, run.path, **GIVEN).last("test")
    assert len(list(run.records("plan"))) == 1, "the same run"


def test_a_run_that_had_not_begun_begins_when_it_is_started_again(folder: Path, torchrun: pytest.MonkeyPatch) -> None:
    run = cut_short(folder, folder.parent / "run")
    (run.path / "state" / "last.safetensors").unlink()
    (run.path / ".unfinished-x").mkdir()
    torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert reslab.train(folder, TINY, run.path, **GIVEN).last("test")
    assert next(run.records("step"))["step"] == 1


def test_started_again_a_folder_of_somebody_else_is_refused_as_before(folder: Path, torchrun: pytest.MonkeyPatch) -> None:
    """The names are those of a run before its first step."""
    notes = folder.parent / "notes"
    (notes / "state").mkdir(parents=True)
    (notes / "log.jsonl").write_text("mine")
    (notes / "state" / "chapter").write_text("mine too")
    torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(reslab.CallError, match="--out must be a new or empty folder"):
        reslab.train(folder, TINY, notes, **GIVEN)
    assert [(notes / name).read_text() for name in ("log.jsonl", "state/chapter")] == ["mine", "mine too"]


def test_started_again_the_run_of_another_torchrun_is_not_continued(folder: Path, torchrun: pytest.MonkeyPatch) -> None:
    run = cut_short(folder, folder.parent / "run")
    torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    torchrun.setenv("TORCHELASTIC_RUN_ID", "another")
    with pytest.raises(reslab.CallError, match="--out must be a new or empty folder"):
        reslab.train(folder, TINY, run.path, **GIVEN)
    torchrun.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(reslab.CallError, match=r"keeps its data .*photos.*; received digits"):
        reslab.train("digits", TINY, run.path, **GIVEN)
    with pytest.raises(reslab.CallError, match="keeps its net custom; received resnet20"):
        reslab.train(folder, "resnet20", run.path, **GIVEN)
    assert max(r["step"] for r in run.records("step")) == 1


def test_a_run_is_trained_by_one_process_at_a_time(folder: Path) -> None:
    run = cut_short(folder, folder.parent / "run")
    code = "import sys; from reslab.run import Run\nwith Run(sys.argv[1]).alone(): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(reslab.CallError, match=r"one process trains a run at a time; .* is being trained now"):
            reslab.train(resume=run.path)
        other.kill()
    assert reslab.train(resume=run.path).last("test")


def test_what_cannot_be_resumed_says_what_is_to_be_done(folder: Path) -> None:
    run = cut_short(folder, folder.parent / "run")
    state = run.path / "state" / "last.safetensors"
    state.rename(state.with_suffix(".away"))
    with pytest.raises(reslab.WorkError, match="was stopped before its first step and has none: remove it and train again"):
        reslab.train(resume=run.path)
    state.with_suffix(".away").rename(state)
    (run.path / ".unfinished-x").mkdir()
    with pytest.raises(reslab.CallError, match="keeps its net custom; received custom"):
        reslab.train(resume=run.path, net=TINY)
    reslab.train(resume=run.path)
    assert not list(run.path.rglob(".unfinished-*"))
    with pytest.raises(reslab.CallError, match="has its model: train into a new --out"):
        reslab.train(resume=run.path)
    (run.path / "report.html").unlink()
    with pytest.raises(reslab.CallError, match=r"`reslab report .*run` draws its report, which is missing"):
        reslab.train(resume=run.path)


def test_a_row_of_the_family_keeps_its_name_when_it_is_given_as_a_spec(folder: Path) -> None:
    reslab.train(folder, reslab.spec("resnet20"), folder.parent / "run", **GIVEN)
    assert "--net resnet20 " in Run(folder.parent / "run").config["command"]
    assert job.name_of(TINY) == "custom"
