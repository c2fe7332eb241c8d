"""Where a study goes, and what its page says of how it was made."""

from pathlib import Path
from typing import Any

import pytest

import reslab
from reslab import studies
from reslab.studies import Call, study, study_all
from reslab.study import STUDIES
from reslab.study.kinds import Given, Setting
from reslab.study.lab import Outcome, Place, find

NET = reslab.spec("resnet20")
LONGER = "What needs longer trainings cannot be decided here."


class Quiet:
    def say(self, text: str) -> None: ...
    def reading(self, what: str, done: int, total: int) -> None: ...


def test_all_studies_go_where_each_would_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing is measured twice."""
    gone: dict[str, list[Place]] = {}

    def answered(name: str, found: Any, call: Call, place: Place, *rest: Any) -> tuple[Path, list[Any]]:
        gone.setdefault(name, []).append(place)
        return place.out, []

    monkeypatch.setattr(studies, "_answered", answered)
    monkeypatch.setattr(studies, "_has_cifar", lambda: True)
    study_all(Call(), Quiet())
    for name in STUDIES:
        study(name, Call(), Quiet())
        assert len(set(gone[name])) == 1
        subject = "-".join(find(name).shipped) or "cifar10"
        assert gone[name][0].out == Path("studies") / f"{name}-{subject}-10m"


def test_all_studies_refuse_a_run_in_one_line() -> None:
    with pytest.raises(reslab.CallError, match="received the run runs/a: name one study"):
        study_all(Call(runs=(Path("runs/a"),)), Quiet())


def test_the_command_that_a_page_prints_can_be_typed() -> None:
    call = Call(data="my photos", net="resnet18", budget="2m", out=Path("here & there"), jobs=2)
    assert studies._command("init", call, 32) == (
        "reslab study init --data 'my photos' --image-size 32 --net resnet18 --out 'here & there' --budget 2m --seeds 3 --jobs 2"
    )
    assert studies._command("lesion", Call(runs=(Path("a b"), Path("c")), jobs=1), 32) == "reslab study lesion 'a b' c --budget 10m --seeds 3 --jobs 1"


def test_a_page_claims_no_seeds_that_were_not_used_and_no_trainings_that_were_not_made() -> None:
    def said(seconds: float, seeds: int, trains: bool, *given: Given) -> str:
        return studies._protocol(Setting(seconds, 2, 5, NET, given), Outcome([], 4, 4, seeds, trains), 32, 32, running=False)

    assert said(600, 5, True) == f"A budget of 10 min, 5 seeds. {LONGER}"
    assert said(600, 1, True) == f"A budget of 10 min, 1 seed. {LONGER}"
    assert said(600, 5, False) == "A budget of 10 min, 5 seeds."
    assert said(600, 0, False, Given("mine", NET, "key")) == "A budget of 10 min."
    assert said(0, 5, True) == "The published protocol, 5 seeds."
