"""A seed decides every random choice of a training, and each of them by itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import reslab
from reslab.train import fit
from reslab.train.passes import Pass


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seed that the layers of the net draw from at each step."""
    held: list[int] = []

    class Watched(Pass):
        def __call__(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            held.append(torch.initial_seed())
            return super().__call__(x, targets)

    monkeypatch.setattr(fit, "Pass", Watched)
    return held


def test_split_first_weights_and_layers_each_follow_the_seed(tmp_path: Path, drawn: list[int]) -> None:
    """At a rate of zero the weights of a run are its first ones."""
    spec = reslab.spec("resnet20", widths=(4,), depths=(1,))

    def choices(name: str, seed: int) -> dict[str, Any]:
        drawn.clear()
        run = reslab.train("digits", spec, tmp_path / name, steps=2, batch_size=64, lr=0.0, seed=seed)
        tested = json.loads((run.path / "split.json").read_text())["test"]
        return {"split": tested, "weights": load_file(run.model / "weights.safetensors")["conv1.weight"].tolist(), "layers": list(drawn)}

    first, again, other = choices("first", 7), choices("again", 7), choices("other", 8)
    assert first == again
    assert [name for name in first if first[name] == other[name]] == []
    assert len({*first["layers"], *other["layers"]}) == 4, "each step has numbers of its own"
