"""Where a study goes, and what its page says of how it was made."""

import re
from pathlib import Path
from typing import Any

import pytest

import reslab
from reslab import studies
from reslab.report.charts import Drawn, caption
from reslab.report.grids import Line, losses
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


def test_another_net_size_or_folder_of_that_name_goes_elsewhere(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name / "photos").mkdir(parents=True)
    calls = [Call(data="digits"), Call(data="digits", net="resnet32"), Call(data="digits", image_size=16), Call(data="digits", budget="2m")]
    calls += [Call(data=str(tmp_path / name / "photos")) for name in ("old", "new")] + [Call(runs=(tmp_path / name,)) for name in ("old", "new")]
    folders = [studies._folder("lesion", call).name for call in calls]
    assert len(set(folders)) == len(folders)
    assert folders[:4] == ["lesion-digits-10m", "lesion-digits-resnet32-10m", "lesion-digits-16px-10m", "lesion-digits-2m"]
    assert folders[4].startswith("lesion-photos-")
    assert studies._folder("lesion", Call(runs=(Path("resnet20-cifar10"),))).name == "lesion-resnet20-cifar10-10m"
    assert studies._folder("lesion", Call(data=".")).name == studies._folder("lesion", Call(data=str(Path.cwd()))).name


@pytest.mark.parametrize("given", [{"jobs": 0}, {"image_size": 0}, {"seeds": 0}], ids=str)
def test_none_of_something_is_no_default(given: dict[str, int]) -> None:
    with pytest.raises(reslab.CallError, match="--seeds must be 1 to 100, --jobs 1 to 1024, --image-size 4 to 1024"):
        Call(**given)  # type: ignore[arg-type]


def test_figures_of_losses_have_room_for_a_guess_among_many_classes() -> None:
    def top(first: float) -> float:
        curve = {"kind": "curve", "seed": 0, "layers": 20, "every": 1, "loss": [first, first - 0.3]}
        drawn = losses("t", [curve], {"all": [Line("all", "#000000", {"layers": 20})]})
        return max(map(float, re.findall(r">([\d.]+)</text>", drawn.svg)))

    assert (top(2.3), top(4.6)) == (4, 5)


def test_numbers_of_a_figure_are_written_whatever_a_folder_is_called() -> None:
    assert Drawn("t", "", [{"net": "caf\udce9"}]).csv == b"net\ncaf\\udce9\n"


def test_a_caption_says_of_how_many_images_it_is_and_which_nets_are_not_drawn() -> None:
    rows = [{"net": f"{i}", "images": 1000} for i in range(6)]
    assert caption("Error", rows, 4) == "Error; 1,000 test images; the first 4 of 6 nets"
    assert caption("Error", [{"net": "a"}], 4) == "Error"
