"""Cells are cached by content, an interrupted study goes on, and what cannot be is one line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import reslab
from reslab.nets.torch import ResNet
from reslab.study import STUDIES, degradation, lab
from reslab.study.data import Data, prepare
from reslab.study.kinds import Cell, Schedule, Setting
from reslab.study.training import errors, lr_at, train

SETTING = Setting(seconds=20, jobs=2, seeds=2)
quiet = lambda text: None  # noqa: E731


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return prepare("digits", None, tmp_path_factory.mktemp("study") / "data", lambda *facts: None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nets and steps small enough for a test, through the study's own cells."""

    def cells(setting: Setting, data: Data, pace: object) -> list[Cell]:
        made = []
        for seed in range(setting.seeds):
            for kind in ("plain", "resnet"):
                spec = reslab.spec(f"{kind}20", depths=(1, 1, 1), in_channels=1)
                made.append(Cell(f"{kind} {seed}", spec, seed, Schedule(5, 64), {"cell_kind": kind, "depth": 8}))
        return made

    monkeypatch.setattr(lab, "find", lambda name: replace(degradation.STUDY, cells=cells))


def test_every_study_is_listed_with_its_own_question() -> None:
    for name, question in STUDIES.items():
        assert lab.find(name).question == question


def test_finished_cells_are_not_measured_again_and_missing_ones_are(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def here(name: str, out: Path, cells: list[Cell], jobs: int):  # type: ignore[no-untyped-def]
        for cell in cells:
            done.append(cell.name)
            lab.work_off(name, out, cell)
            yield cell

    monkeypatch.setattr(lab, "_work", here)
    first, _ = lab.run("degradation", "digits", None, SETTING, tmp_path, quiet)
    assert done == ["plain 0", "resnet 0", "plain 1", "resnet 1"]
    files = sorted((tmp_path / "cells").iterdir())
    before = files[2].read_text()
    files[2].unlink()
    again, _ = lab.run("degradation", "digits", None, SETTING, tmp_path, quiet)
    assert len(done) == 5, "only the missing cell"
    assert files[2].read_text() == before, "bit for bit"
    assert again == first
    lab.run("degradation", "digits", None, SETTING._replace(seeds=3), tmp_path, quiet)
    assert done[5:] == ["plain 2", "resnet 2"], "an extended study keeps what it has"


def test_a_cell_is_named_by_everything_that_decides_its_records() -> None:
    cell = Cell("a", reslab.spec("resnet20"), 0, Schedule(5))
    others = [
        replace(cell, seed=1), replace(cell, schedule=Schedule(6)), replace(cell, spec=reslab.spec("resnet20", eps=1e-4)), replace(cell, facts={"depth": 2}),
    ]  # fmt: skip
    keys = [c.key("degradation", "print") for c in [cell, *others]] + [cell.key("other", "print"), cell.key("degradation", "other")]
    assert len(set(keys)) == len(keys)
    assert replace(cell).key("degradation", "print") == keys[0]


def test_twins_have_the_same_parameters_steps_and_seeds(data: Data) -> None:
    cells = degradation.cells(Setting(120, 2, 3), data, lambda spec, batch: 0.01)
    for plain, residual in zip(cells[::2], cells[1::2], strict=True):
        assert plain.spec.cost(8).params == residual.spec.cost(8).params
        assert (plain.seed, plain.schedule, plain.facts["depth"]) == (residual.seed, residual.schedule, residual.facts["depth"])


def test_training_is_the_same_for_the_same_seed_and_leaves_random_numbers_to_the_seed(data: Data) -> None:
    runs = []
    for disturb in (0, 5):
        torch.manual_seed(1)
        net = ResNet(reslab.spec("resnet20", depths=(1, 1, 1), in_channels=1, num_classes=10, drop_path=0.2))
        torch.rand(disturb)
        runs.append((train(net, data, Schedule(6, 32), seed=3), errors(net, data)))
    assert runs[0] == runs[1]
    assert runs[0][1]["test_n"] == 359


def test_a_lost_loss_ends_the_training_and_says_so(data: Data) -> None:
    net = ResNet(reslab.spec("resnet110", norm="none", in_channels=1, num_classes=10))
    losses = train(net, data, Schedule(20, 32), seed=0)
    assert len(losses) < 20
    assert np.isnan(losses[-1])


def test_learning_rate_rises_then_falls_to_a_tenth_twice() -> None:
    schedule = Schedule(100, lr=1.0, warmup=0.1)
    assert [lr_at(schedule, step) for step in (0, 9, 49, 50, 75)] == pytest.approx([0.1, 1, 1, 0.1, 0.01])


def test_bad_calls_are_one_line(tmp_path: Path, data: Data, cli) -> None:  # type: ignore[no-untyped-def]
    for arguments, message in (
        (("degradatoin",), "unknown study 'degradatoin': did you mean 'degradation'"),
        (("degradation", "--budget", "soon"), "must be a time such as 90s, 20m or 1h30m"),
        (("degradation", "--data", "digits", "--budget", "0.01", "--out", str(tmp_path / "o")), "must allow every cell a step"),
        (("degradation", "--seeds", "0"), "--seeds must be 1 to 100"),
    ):
        done = cli("study", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr


def test_damaged_records_name_the_file(small: None, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"kind": ')
    with pytest.raises(reslab.WorkError, match="is damaged: delete it"):
        lab.read(tmp_path / "x.jsonl")


def test_study_from_the_command_line_to_the_page(tmp_path: Path, cli) -> None:  # type: ignore[no-untyped-def]
    listed = cli("study")
    assert all(name in listed.stdout for name in STUDIES)
    done = cli("study", "degradation", "--budget", "15s", "--seeds", "2", "--out", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "s" / "study.html").read_text()
    assert "Does a plain net train worse" in page
    assert page.count("<svg") == 2
    assert "://" not in page.replace("http://www.w3.org", ""), "it opens offline"
    rows = [json.loads(line) for file in (tmp_path / "s" / "cells").iterdir() for line in file.read_text().splitlines()]
    assert {r["seed"] for r in rows} == {0, 1}
