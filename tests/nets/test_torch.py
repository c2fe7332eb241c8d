import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reslab
from reslab.nets.torch import Add
from tests.conftest import relative, scramble

GOLDENS = Path(__file__).parents[1] / "goldens" / "parameters.json"


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
@pytest.mark.parametrize("size", [64, 97])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_equals_torchvision_with_random_weights_and_statistics(torchvision_models, name: str, size: int, train: bool) -> None:
    theirs = scramble(getattr(torchvision_models, name)(weights=None)).train(train)
    ours = reslab.build(name).train(train)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, stages = _stages(theirs, x)
        outputs: dict[str, torch.Tensor] = {}
        got = ours(x, outputs)
    for number, (stage, depth) in enumerate(zip(stages, ours.spec.depths, strict=True), start=1):
        assert relative(outputs[f"layer{number}.{depth - 1}"], stage) < 1e-5
    assert relative(got, want) < 1e-5

    with torch.no_grad():
        ours.load_state_dict(theirs.state_dict())
        ours.layer3[1].bn2.running_mean[0] += 0.5
        ours.layer3[1].bn2.bias[0] += 0.5
        assert relative(ours(x), want) > 1e-5, "one corrupted channel must be noticed"


def _stages(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    held: list[torch.Tensor] = []
    hooks = [getattr(net, f"layer{i}").register_forward_hook(lambda m, i, o: held.append(o)) for i in range(1, 5)]
    out = net(x)
    for hook in hooks:
        hook.remove()
    return out, held


def test_parameter_names_and_shapes_are_the_pinned_ones() -> None:
    """A changed name breaks every stored model. If it must be: python -m tests.nets.test_torch writes the file anew."""
    assert _names() == json.loads(GOLDENS.read_text())


PINNED: dict[str, dict[str, Any]] = {
    "resnet20": {}, "plain20": {}, "resnet18": {}, "resnet50": {}, "preact20": {}, "resnet18d": {}, "se_resnet18": {}, "preact_resnet50": {},
    "resnetrs50": {"depths": (1, 1, 1, 1)}, "resnet110_shortcut_gate": {"depths": (1, 1, 1)}, "resnet110_fixup": {"depths": (1, 1, 1)},
    "resnet110_rezero": {"depths": (1, 1, 1)}, "resnet110_bn_after_add": {"depths": (1, 1, 1)}, "skipblock8": {"depths": (1, 2, 2)},
}  # fmt: skip


def _names() -> dict[str, dict[str, str]]:
    with torch.device("meta"):
        return {name: {k: " ".join(map(str, v.shape)) for k, v in reslab.build(name, **changes).state_dict().items()} for name, changes in PINNED.items()}


def test_forward_returns_every_block_by_name() -> None:
    net = reslab.build("resnet20").eval()
    outputs: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32), outputs)
    assert list(outputs) == ["stem", *(f"layer{s}.{b}" for s in (1, 2, 3) for b in (0, 1, 2))]
    assert outputs["layer3.2"].shape == (1, 64, 8, 8)


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "plain20"])
def test_every_relu_is_its_own_and_every_addition_a_module(name: str) -> None:
    net = reslab.build(name)
    relus = [m for m in net.modules() if isinstance(m, nn.ReLU)]
    blocks = sum(net.spec.depths)
    assert not any(relu.inplace for relu in relus)
    assert len(relus) == 1 + blocks * (2 if net.spec.block == "basic" else 3)  # modules() lists a shared one once
    assert sum(isinstance(m, Add) for m in net.modules()) == (0 if net.spec.shortcut == "none" else blocks)


def test_plain_twin_has_the_same_parameters() -> None:
    residual, plain = reslab.build("resnet56"), reslab.build("plain56")
    assert {k: v.shape for k, v in residual.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


def test_a_net_of_shapes_alone_draws_no_random_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device torch takes a millisecond for each such call; tests/test_spec.py builds every row there."""
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda *a, **k: pytest.fail("called for a tensor without values"))
    with torch.device("meta"):
        assert all(p.is_meta for p in reslab.build("resnet20").parameters())


if __name__ == "__main__":
    GOLDENS.write_text(json.dumps(_names(), indent=0) + "\n")
