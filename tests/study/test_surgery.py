"""Lesions whose outcome is known, and nets that are as they were."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reslab.data.source import open_images
from reslab.data.split import split
from reslab.nets.parts import PadShortcut
from reslab.nets.torch import ResNet
from reslab.study.data import Data, prepare
from reslab.study.paths import along_paths
from reslab.study.surgery import Lesion, batches, block_inputs, interchangeable, lesioned, mistakes, remove, units
from tests.study.tiny import everything, tiny

ITEMS = np.arange(120)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return prepare(split(open_images("digits"), 0), 8, tmp_path_factory.mktemp("images"))[0]


def zero_branch(block: nn.Module, order: str) -> None:
    """The last scale and bias of the branch are zero, or its last convolution where no norm ends it."""
    for parameter in block.get_submodule("conv2" if order in ("preact", "bn-after-add") else "bn2").parameters():
        nn.init.zeros_(parameter)


@torch.no_grad()
@pytest.mark.parametrize(
    ("order", "shortcut"),
    [*product(["original", "bn-after-add", "relu-before-add", "relu-preact", "preact"], ["A", "B", "C"]), ("original", "late")],
)
def test_lesion_of_a_branch_that_yields_nothing_changes_nothing(order: str, shortcut: str) -> None:
    net, x = tiny(order=order, shortcut=shortcut), torch.randn(4, 1, 8, 8)
    for number, unit in enumerate(units(net)):
        block = net.get_submodule(unit.name)
        with remove(block, unit):
            lesioned = net(x)
        assert not torch.equal(lesioned, net(x)), f"block {number} does something"
        zero_branch(block, order)
        whole = net(x)
        with remove(block, unit):
            assert torch.equal(net(x), whole)


@torch.no_grad()
@pytest.mark.parametrize("carry", ["scaling", "exclusive-gate", "shortcut-gate", "dropout"])
def test_what_a_changed_shortcut_carries_remains(carry: str) -> None:
    net, x = tiny(carry=carry), torch.randn(4, 1, 8, 8)
    unit = units(net)[3]
    block = net.get_submodule(unit.name)
    with remove(block, unit):
        lesioned = net(x)
    zero_branch(block, "original")
    assert torch.allclose(lesioned, net(x), atol=1e-6)


@torch.no_grad()
def test_a_plain_block_is_left_out_and_shortcut_a_stands_where_shapes_change() -> None:
    net, x = tiny(shortcut="none"), torch.randn(4, 1, 8, 8)
    blocks = [net.get_submodule(unit.name) for unit in units(net)]
    for number, instead in ((1, nn.Identity()), (3, PadShortcut(8, 16, 2))):
        with remove(blocks[number], units(net)[number]):
            lesioned = net(x)
        expected = net.stem(x)
        for index, block in enumerate(blocks):
            expected = instead(expected) if index == number else block(expected)
        assert torch.equal(lesioned, net.head(expected))


def test_batches_are_as_large_as_memory_holds(data: Data) -> None:
    large = replace(data, facts=replace(data.facts, preprocess={**data.facts.preprocess, "image_size": 1024}))
    assert [len(batch) for batch in batches(tiny(), data, ITEMS)] == [100, 20]
    sizes = [len(batch) for batch in batches(tiny(), large, ITEMS)]
    assert sum(sizes) == 120
    assert 1 <= sizes[0] < 20


@torch.no_grad()
def test_permuting_identical_blocks_changes_nothing_and_others_do() -> None:
    net, x = tiny(), torch.randn(4, 1, 8, 8)
    disorder = Lesion(order=(2, 0, 1, 3, 4, 5, 6))
    assert not torch.equal(lesioned(net, block_inputs(net, x), disorder), net(x))
    for block in net.stages[0][1:]:
        block.load_state_dict(net.stages[0][0].state_dict())
    assert torch.equal(lesioned(net, block_inputs(net, x), disorder), net(x))


def test_only_blocks_of_a_stage_that_keep_their_shape_change_places() -> None:
    assert interchangeable(tiny()) == [[0, 1, 2], [4], [6]]


@torch.no_grad()
@pytest.mark.parametrize("lesion", [Lesion(), Lesion((4,)), Lesion((6, 1, 3)), Lesion(order=(0, 2, 1, 3, 4, 5, 6)), Lesion((5,), (0, 2, 1, 3, 4, 5, 6))])
def test_work_that_is_shared_gives_what_each_lesion_gives_alone(data: Data, lesion: Lesion) -> None:
    net = tiny()
    x, y = data.test_batch(ITEMS)
    expected = net.stem(x)
    handles = [remove(net.get_submodule(units(net)[number].name), units(net)[number]) for number in lesion.removed]
    for number in lesion.order or range(7):
        expected = net.get_submodule(units(net)[number].name)(expected)
    wrong = (net.head(expected).argmax(1) != y).numpy()
    for handle in handles:
        handle.remove()
    assert (mistakes(net, data, ITEMS, [Lesion((2,)), lesion])[1] == wrong).all()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["remove", "permute", "paths"])
def test_net_and_random_numbers_are_as_they_were_also_after_an_exception(data: Data, monkeypatch: pytest.MonkeyPatch, kind: str, fails: bool) -> None:
    net = tiny().train()
    net.stages[1].eval()
    net.conv1.weight.requires_grad_(False)
    x, y = data.train_batch(ITEMS)
    work: dict[str, Callable[[], object]] = {
        "remove": lambda: mistakes(net, data, ITEMS, [Lesion((0, 3))]),
        "permute": lambda: mistakes(net, data, ITEMS, [Lesion(order=(2, 1, 0, 3, 4, 5, 6))]),
        "paths": lambda: along_paths(net, x, y, torch.ones(len(x), 7, dtype=torch.bool)),
    }
    before = everything(net)
    if fails:

        def break_down(module: nn.Module, x: Tensor) -> Tensor:
            torch.rand(1)
            raise RuntimeError("in the middle")

        monkeypatch.setattr(ResNet, "head", break_down)
        with pytest.raises(RuntimeError, match="in the middle"):
            work[kind]()
    else:
        work[kind]()
    assert everything(net) == before
