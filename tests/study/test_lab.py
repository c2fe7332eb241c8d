"""Cells are cached by content, an interrupted study goes on, and what cannot be is one line."""

import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import reslab
from reslab.nets.torch import ResNet
from reslab.run import write_whole
from reslab.study import STUDIES, degradation, estimation, kinds, lab, landscape, lesion, training
from reslab.study.data import Data, load
from reslab.study.kinds import Cell, Given, Ready, Schedule, Setting, Subject
from reslab.study.lab import Place
from reslab.study.training import errors, lr_at, outcome, train
from reslab.study.twins import deeper, layers, plain

TINY = reslab.spec("resnet20", depths=(1, 1, 1), in_channels=1)
SETTING = Setting(seconds=60, jobs=2, seeds=2, net=TINY)
quiet = lambda text: None  # noqa: E731


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nets and steps small enough for a test, worked off in this process; the work that was done, in order."""

    def cells(setting: Setting, data: Data, pace: object) -> list[Cell]:
        made = []
        for seed in range(setting.seeds):
            for twin, spec in (("plain", plain(setting.net)), ("residual", setting.net)):
                made.append(Cell(f"{twin} {seed}", Subject(spec, seed, Schedule(5, 64)), facts={"twin": twin, "layers": layers(spec)}))
        return made

    done: list[str] = []

    class Here:
        """A pool that works at once."""

        def __init__(self, *facts: object) -> None: ...
        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *facts: object) -> None: ...
        def shutdown(self, **facts: object) -> None: ...
        def submit(self, function, *arguments):  # type: ignore[no-untyped-def]
            item = arguments[-1]
            done.append(f"train {item.seed}" if isinstance(item, Subject) else item.name)
            future: Future[None] = Future()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(lab, "find", lambda name: replace(degradation.STUDY, cells=cells))
    monkeypatch.setattr(lab, "ProcessPoolExecutor", Here)
    return done


def test_every_study_is_listed_with_its_own_question() -> None:
    for name, question in STUDIES.items():
        assert lab.find(name).question == question


def test_finished_cells_are_not_measured_again_and_missing_ones_are(small: list[str], place: Place, tmp_path: Path) -> None:
    here = place._replace(out=tmp_path / "out", store=tmp_path)
    first = lab.run("degradation", here, SETTING, quiet)
    assert sorted(small) == ["plain 0", "plain 1", "residual 0", "residual 1", "train 0", "train 0", "train 1", "train 1"]
    files = sorted((tmp_path / "out" / "cells").iterdir())
    before, net = files[2].read_text(), {f.name: f.read_bytes() for f in (tmp_path / "nets").iterdir()}
    small.clear()
    files[2].unlink()
    again = lab.run("degradation", here, SETTING, quiet)
    assert len(small) == 1, "only the missing cell, on the net that is there"
    assert files[2].read_text() == before, "bit for bit"
    assert again == first
    small.clear()
    files[2].unlink()
    for file in (tmp_path / "nets").iterdir():
        file.unlink()
    assert lab.run("degradation", here, SETTING, quiet) == first
    (made,) = (tmp_path / "nets").iterdir()
    trained, was = json.loads(_header(made.read_bytes())), json.loads(_header(net[made.name]))
    assert trained.pop("seconds") >= 0 <= was.pop("seconds")
    assert trained == was, "the same training again"
    small.clear()
    lab.run("degradation", here, SETTING._replace(seeds=3), quiet)
    assert sorted(small) == ["plain 2", "residual 2", "train 2", "train 2"], "an extended study keeps what it has"


def _header(safetensors: bytes) -> str:
    length = int.from_bytes(safetensors[:8], "little")
    text: str = json.loads(safetensors[8 : 8 + length])["__metadata__"]["reslab"]
    return text


def test_a_full_disk_in_the_middle_keeps_what_is_finished(small: list[str], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, written = place._replace(out=tmp_path / "out", store=tmp_path), []

    def full(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) > 4:
            raise reslab.WorkError(f"{path} cannot be written: No space left on device; what was there is kept")
        write_whole(path, data)

    monkeypatch.setattr(lab, "write_whole", full)
    with pytest.raises(reslab.WorkError, match="No space left on device"):
        lab.run("degradation", here, SETTING, quiet)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 3
    monkeypatch.setattr(lab, "write_whole", write_whole)
    small.clear()
    assert lab.run("degradation", here, SETTING, quiet).done == 4
    assert len([each for each in small if not each.startswith("train")]) == 1


def test_work_that_the_budget_has_no_time_for_is_left_and_done_by_the_next_call(small: list[str], place: Place, tmp_path: Path) -> None:
    here = place._replace(out=tmp_path / "out", store=tmp_path)
    some = lab.run("degradation", here, SETTING._replace(seconds=1e-9), quiet)
    assert 1 <= some.done < some.planned == 4
    assert lab.run("degradation", here, SETTING, quiet).done == 4


def test_more_seeds_keep_the_schedules_that_the_first_were_planned_by(data: Data, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paces = iter(range(1, 100))
    monkeypatch.setattr(lab._Pace, "_timed", lambda self, spec, batch: next(paces) / 1000)

    def planned(**changes: float) -> list[Cell]:
        return lab._plan(degradation.STUDY, "degradation", data, SETTING._replace(**changes), place._replace(out=tmp_path))

    first = planned()
    assert planned() == first
    more = planned(seeds=3)
    assert [cell for cell in more if cell.subject.seed < 2] == first
    assert len({cell.subject.schedule for cell in more}) == 1
    assert planned(seeds=1) == [cell for cell in first if cell.subject.seed < 1]
    assert planned(seconds=61)[0].subject.schedule != first[0].subject.schedule, "another budget is another plan"
    assert planned() == first, "and leaves this one as it was"
    for plan in tmp_path.glob("plan-*.json"):
        plan.write_text('{"asked": ')
    assert planned()[0].subject.schedule != first[0].subject.schedule, "a damaged plan is made anew"


def test_a_cell_is_named_by_everything_that_decides_its_records() -> None:
    subject = Subject(TINY, 0, Schedule(5))
    cell = Cell("a", subject)
    others = [replace(subject, seed=1), replace(subject, schedule=Schedule(6)), replace(subject, spec=replace(TINY, eps=1e-4)), replace(subject, weights="x")]
    cells = [cell, *(Cell("a", other) for other in others), replace(cell, facts={"depth": 2}), replace(cell, training=Schedule(7))]
    keys = [c.key("degradation", "print") for c in cells] + [cell.key("degradation", "other")]
    assert len(set(keys)) == len(keys)
    assert replace(cell).key("degradation", "print") == keys[0]
    nets = [s.key("print") for s in (subject, *others)]
    assert len(set(nets)) == len(nets)


def test_records_and_nets_are_named_by_the_code_that_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(shutil.copytree(kinds.PACKAGE, tmp_path / "reslab", ignore=lambda _, names: {n for n in names if "." in n and not n.endswith(".py")}))
    monkeypatch.setattr(kinds, "PACKAGE", package)
    monkeypatch.setattr(kinds, "code", kinds.code.__wrapped__)
    given, trained = Subject(TINY, weights="key"), Subject(TINY, 0, Schedule(5))

    def keys() -> list[str]:
        return [*(Cell("a", given).key(name, "print") for name in ("receptive", "lesion")), trained.key("print")]

    before = keys()
    for file, changes in (
        ("nets/torch.py", [True, True, True]),
        ("nets/parts.py", [True, True, True]),
        ("layout.py", [True, True, True]),
        ("data/preprocess.py", [True, True, True]),
        ("receptive.py", [True, False, False]),
        ("study/surgery.py", [False, True, False]),
        ("data/augment.py", [False, False, True]),
        ("serve/server.py", [False, False, False]),
    ):
        text = (package / file).read_text()
        (package / file).write_text(text + "\n")
        assert [new != old for new, old in zip(keys(), before, strict=True)] == changes, file
        (package / file).write_text(text)


@pytest.mark.parametrize(
    ("name", "seeds", "trains"),
    [("degradation", 3, True), ("gradients", 3, True), ("shattering", 3, False), ("lesion", 1, True), ("landscape", 1, True), ("estimation", 1, True)],
)
def test_an_outcome_counts_the_seeds_that_nets_were_made_from(name: str, seeds: int, trains: bool, data: Data, place: Place, tmp_path: Path) -> None:
    def outcome(*given: Given) -> lab.Outcome:
        cells = lab.find(name).cells(SETTING._replace(seeds=3, given=given), data, lambda spec, batch: 0.001)
        here = place._replace(out=tmp_path)
        for cell in cells:
            write_whole(here.cell(name, cell, "print"), b"")
        return lab._outcome(name, here, cells, "print")

    found = outcome()
    assert (found.seeds, found.trains) == (seeds, trains)
    if lab.find(name).shipped:
        mine = outcome(Given("mine", TINY, "key"))
        assert (mine.seeds, mine.trains) == (name == "estimation", False), "the net without training that estimation puts beside has a seed"


def test_an_interrupted_training_goes_on_bit_for_bit(place: Place, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(TINY, 3, Schedule(8, 64))
    assert subject.schedule
    whole = lab.initial(subject)
    losses = train(whole, data, subject.schedule, subject.seed)
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)

    def stop(step: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(lab.initial(subject), data, subject.schedule, subject.seed, stop, tmp_path / "s")
    steps: list[int] = []
    net = lab.initial(subject)
    resumed = train(net, data, subject.schedule, subject.seed, lambda step, loss: steps.append(step), tmp_path / "s")
    assert steps == [5, 6, 7]
    assert resumed == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), net.state_dict().values(), strict=True))
    (tmp_path / "s").write_bytes(b"no tensors")
    assert train(lab.initial(subject), data, subject.schedule, subject.seed, None, tmp_path / "s") == losses, "a damaged one is not used"


def test_a_study_leaves_random_numbers_alone(place: Place) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    lab.initial(Subject(TINY, 3))
    lab._Pace(load(place.data), 1, {})(TINY, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_twins_have_the_same_parameters_steps_and_seeds(data: Data) -> None:
    setting = Setting(120, 2, 3, reslab.spec("resnet20", in_channels=1))
    cells = degradation.cells(setting, data, lambda spec, batch: 0.01)
    for one, two in zip(cells[::2], cells[1::2], strict=True):
        assert one.subject.spec.cost(8).params == two.subject.spec.cost(8).params
        assert (one.subject.seed, one.subject.schedule, one.facts["layers"]) == (two.subject.seed, two.subject.schedule, two.facts["layers"])
    assert {cell.facts["layers"] for cell in cells} == {20, 56}


def test_a_training_takes_one_process_however_many_there_are(data: Data) -> None:
    """A hundred times as many processes as trainings are no hundred times the time."""
    wide = Setting(120, 600, 3, reslab.spec("resnet20", in_channels=1))
    pace = lambda spec, batch: 0.01 * len(list(spec.layers(8)))  # noqa: E731
    for study in (degradation, lesion, estimation, landscape):
        for cell in study.cells(wide, data, pace):
            assert cell.subject.schedule is None or cell.subject.schedule.steps * pace(cell.subject.spec, 0) <= wide.seconds
    narrow = lesion.cells(wide._replace(jobs=2), data, pace)
    assert [c.subject.schedule for c in narrow] == [c.subject.schedule for c in lesion.cells(wide, data, pace)], "it makes two nets"


def test_work_that_fails_is_one_line_and_keeps_what_is_finished(small: list[str], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(place: Place, subject: Subject) -> None:
        if subject.seed:
            raise RuntimeError("can't allocate memory\nat all")
        train_one(place, subject)

    train_one = lab.train_one
    monkeypatch.setattr(lab, "train_one", out_of_memory)
    with pytest.raises(reslab.WorkError, match=r"^the training for plain 1 failed: RuntimeError can't allocate memory; the finished cells are kept"):
        lab.run("degradation", place._replace(out=tmp_path), SETTING._replace(jobs=1), quiet)
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_layers_are_counted_as_in_the_papers() -> None:
    for name in ("resnet20", "plain56", "resnet110", "resnet18", "resnet50", "resnet152"):
        assert layers(reslab.spec(name)) == int(name.removeprefix("resnet").removeprefix("plain"))
    assert layers(deeper(reslab.spec("resnet20"), 6)) == 110


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
    assert outcome(Ready(net, losses), data)[1]["steps"] == len(losses) - 1, "the step that lost it was not taken"


def test_learning_rate_rises_then_falls_to_a_tenth_twice() -> None:
    schedule = Schedule(100, lr=1.0, warmup=0.1)
    assert [lr_at(schedule, step) for step in (0, 9, 49, 50, 75)] == pytest.approx([0.1, 1, 1, 0.1, 0.01])


def test_bad_calls_are_one_line(tmp_path: Path, data: Data, words) -> None:  # type: ignore[no-untyped-def]
    for arguments, message in (
        (("degradatoin",), "unknown study 'degradatoin': did you mean 'degradation'"),
        (("degradation", "--budget", "soon"), "must be a time such as 90s, 20m or 1h30m"),
        (("degradation", "--data", "digits", "--budget", "0.01s", "--out", str(tmp_path / "o")), "must allow every cell a step"),
        (("degradation", "--seeds", "0"), "--seeds must be 1 to 100"),
    ):
        done = words("study", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr


def test_damaged_records_name_the_file(small: None, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"kind": ')
    with pytest.raises(reslab.WorkError, match="is damaged: delete it"):
        lab.read(tmp_path / "x.jsonl")


def test_runs_that_a_study_cannot_use_are_one_line(tmp_path: Path, cli) -> None:  # type: ignore[no-untyped-def]
    done = cli("study", "degradation", tmp_path / "run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "study degradation makes its own nets" in done.stderr


def test_study_from_the_command_line_to_the_page(tmp_path: Path, cli) -> None:  # type: ignore[no-untyped-def]
    listed = cli("study")
    assert all(name in listed.stdout for name in STUDIES)
    for _ in range(2):  # where a busy machine left the budget no time for a net, the second call makes it
        done = cli("study", "degradation", "--budget", "12s", "--seeds", "1", "--out", tmp_path / "s")
        assert done.returncode == 0, done.stderr
    page = (tmp_path / "s" / "study.html").read_text()
    assert "Does a plain net train worse" in page
    assert page.count("<svg") == page.count('href="data:text/csv;base64,') == 2
    assert "://" not in page.replace("http://www.w3.org", ""), "it opens offline"
    told = json.loads((tmp_path / "s" / "study.json").read_text())
    assert told["answer"] in page
    verdicts = [(claim["n"], claim["verdict"]) for claim in told["claims"]]
    assert verdicts[:3] == [(1, "not decided at this budget")] * 3, "one seed decides nothing about seeds"
    assert all(n > 100 for n, _ in verdicts[3:]), "only what it says of its own nets, over the test images, may be decided"
    for number in range(1, 1 + len(told["figures"])):
        ElementTree.parse(tmp_path / "s" / "figures" / f"{number}.svg")
        assert (tmp_path / "s" / "figures" / f"{number}.csv").read_text().startswith("twin,layers,seed,")
    rows = [json.loads(line) for file in (tmp_path / "s" / "cells").iterdir() for line in file.read_text().splitlines()]
    assert {r["seed"] for r in rows} == {0}


PARENT = """
import os, signal, sys, time
from pathlib import Path
from reslab.host import end_on_signals
from reslab.study.lab import processes

def work(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what starts the tests may ignore it
    end_on_signals()
    with processes(2, int) as pool:
        for _ in range(2):
            pool.submit(work, sys.argv[1])
        while len(os.listdir(sys.argv[1])) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(600)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_processes_of_a_study_end_with_it_at_once(number: signal.Signals, status: int, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "workers").mkdir()
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "workers"), str(int(number))]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60).returncode == status
    workers = [Path("/proc") / file.name for file in (tmp_path / "workers").iterdir()]
    until = time.monotonic() + 10
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(workers) == 2


def _runs(process: Path) -> bool:
    try:
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
