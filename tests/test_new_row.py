"""A network that nobody thought of is one row: counts, both frameworks, pictures and parity follow without being told."""

from collections.abc import Iterator

import pytest
import torch

import reslab
from reslab.catalogue.models import models
from reslab.cli import main
from reslab.family import FAMILY, Row
from reslab.spec import Spec
from tests.nets.parity import TOLERANCE, worst
from tests.test_spec import counted, measured

ODD = Spec("bottleneck", (1, 2, 1), (8, 12, 16), "deep-conv", "D", order="original", squeeze=4, groups=2, inner=2, antialias=True, num_classes=7)


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(FAMILY, "mynet", Row(ODD, 64, "this test", 0.5, "nothing, nobody"))
    return


def test_a_new_row_is_counted_and_built_in_torch() -> None:
    assert counted(ODD, 64) == measured(ODD, 64)
    assert reslab.build("mynet").eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    assert reslab.spec("mynet").cost(64).params == sum(p.numel() for p in reslab.build("mynet").parameters())


def test_a_new_row_equals_itself_in_keras() -> None:
    assert worst(ODD) < TOLERANCE


def test_a_new_row_is_listed_shown_and_drawn(capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    assert [model.name for model in models(["mynet"])] == ["mynet"]
    drawing = tmp_path_factory.mktemp("drawn") / "mynet.svg"
    with pytest.raises(SystemExit) as ended:
        main(["show", "mynet", "--svg", str(drawing)])
    assert ended.value.code == 0
    assert "layer2.0.se.multiply" in capsys.readouterr().out
    assert drawing.read_text().startswith("<svg")
