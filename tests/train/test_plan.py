import os
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import reslab
from reslab.errors import WorkError
from reslab.nets import dots
from reslab.train import hardware, plan
from reslab.train.hardware import machine
from reslab.train.plan import Plan, low_size
from reslab.train.recipe import Recipe, resolve


def test_the_first_step_which_pays_for_new_memory_is_no_estimate_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve(Recipe(epochs=3, batch_size=8, precision="fp32", low_resolution=0.5), 80, 16, upright=False)
    clock = cycle([0.0, 10.0, 10.0, 12.0])  # a first of ten seconds, then one of two
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
    with machine() as here:
        made = plan.make_plan(reslab.build("resnet20", num_classes=2), torch.randn(8, 3, 16, 16), recipe, train=80, val=16, macs=0, machine=here)
    assert (made.step_seconds, made.low_step_seconds, made.val_seconds) == (2, 2, 4)
    assert made.seconds(made.steps, 0.5) == 60 + 3 * 4


def test_an_image_that_cannot_be_read_does_not_make_steps_free() -> None:
    recipe = resolve(Recipe(epochs=3, batch_size=8, micro_batch=4, precision="fp32", low_resolution=0.0), 80, 16, upright=False)
    with machine() as here:
        for images in (7, 3):
            made = plan.make_plan(reslab.build("resnet20", num_classes=2), torch.randn(images, 3, 16, 16), recipe, train=80, val=16, macs=0, machine=here)
            assert made.step_seconds > 0


def test_steps_of_two_passes_take_twice_the_time() -> None:
    once = Plan(100, 10, "fp32", "", step_seconds=4.0, low_step_seconds=1.0, val_seconds=0.5)
    assert once.seconds(100, 0.5) == 50 + 200 + 5
    late, early = replace(once, twice_from=0.75), replace(once, twice_from=0.4)
    assert late.seconds(100, 0.5) == once.seconds(100, 0.5) + 25 * 4
    assert early.seconds(100, 0.5) == once.seconds(100, 0.5) + 10 * 1 + 50 * 4
    assert late.seconds(100, 0.5, done=90) == 2 * 10 * 4 + 0.5
    assert replace(once, twice_from=0.0).seconds(100, 0.5) == 2 * 250 + 5
    assert late.steps_within(late.seconds(100, 0.5), 0.5) == 100


def planned(
    monkeypatch: pytest.MonkeyPatch, took: Callable[[Plan], float], epochs: int = 10_000, seconds: float = float("inf"), net: str = "resnet20", **given: object
) -> Plan:  # fmt: skip
    """The plan of a net whose steps take what `took` says."""
    monkeypatch.setattr(plan, "_time_step", lambda net, x, recipe, made, here: took(made))
    recipe = resolve(Recipe(epochs=epochs, batch_size=8, **{"precision": "fp32", "low_resolution": 0.0, **given}), 80, 16, upright=False)  # type: ignore[arg-type]
    with machine() as here:
        return plan.make_plan(reslab.build(net, num_classes=2), torch.randn(8, 3, 16, 16), recipe, train=80, val=16, macs=0, machine=here, seconds=seconds)


def test_a_net_is_compiled_where_the_training_repays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "reason_against", lambda: "no compiler here")

    def faster(made: Plan) -> float:
        return 0.5 if made.compiled else 1.0

    long = planned(monkeypatch, faster)
    assert (long.compiled, long.step_seconds, long.compiling[:20]) == (True, 0.5, "2.00 times as fast, ")
    short = planned(monkeypatch, faster, epochs=10)
    assert (short.compiled, short.step_seconds) == (False, 1.0)
    assert short.compiling.startswith("a trial takes about 3"), short.compiling
    assert not planned(monkeypatch, faster, seconds=100.0).compiled, "a budget counts, not what the epochs would take"
    assert not planned(monkeypatch, faster, compile="never").compiled
    assert planned(monkeypatch, faster, epochs=10, compile="always").compiled
    assert not planned(monkeypatch, lambda made: 0.99 if made.compiled else 1.0).compiled, "what was not faster is left"
    monkeypatch.setattr(plan, "reason_against", lambda: "")
    assert planned(monkeypatch, faster).compiling.startswith("the kernels in C"), "no time for a trial that was always lost"
    assert planned(monkeypatch, faster, compile="always").compiled
    assert planned(monkeypatch, faster, fuse="never").compiled


def test_a_compiler_that_fails_is_told_of_and_stops_only_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(made: Plan) -> float:
        if made.compiled:
            raise RuntimeError("no C++ compiler\nand a long trace")
        return 1.0

    made = planned(monkeypatch, broken, fuse="never")
    assert (made.compiled, made.compiling) == (False, "the compiler failed: no C++ compiler")
    with pytest.raises(WorkError, match=r"could not be compiled: no C\+\+ compiler; leave out --compile always"):
        planned(monkeypatch, broken, compile="always")


def test_fusing_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "reason_against", lambda: "no compiler here")
    made = [planned(monkeypatch, lambda made: 1.0, epochs=10, fuse=fuse) for fuse in ("auto", "never")]
    assert [(one.fused, one.fusing) for one in made] == [(True, "no compiler here"), (False, "")]


def test_planning_leaves_the_net_as_it_was() -> None:
    net = reslab.build("resnet20", num_classes=2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    recipe = resolve(Recipe(epochs=3, batch_size=8, low_resolution=0.5), 80, 16, upright=False)
    with machine() as here:
        plan.make_plan(net, torch.randn(8, 3, 16, 16), recipe, train=80, val=16, macs=0, machine=here)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_winograds_algorithm_is_taken_where_it_was_faster(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(plan, "has_amx", lambda: False)

    def winograd(seconds: float, **given: object) -> bool:
        took = lambda made: seconds if made.winograd else 1.0  # noqa: E731
        return planned(monkeypatch, took, **{"net": "resnet8", "compile": "never", "precision": precision, **given}).winograd  # type: ignore[arg-type]

    assert (winograd(0.5), winograd(0.99)) == (True, False)
    assert not winograd(0.5, convolution="direct")
    for usable in (False, True):
        monkeypatch.setattr(dots, "usable", lambda usable=usable: usable)
        assert winograd(0.5, net="resnet20") == (usable and precision == "bf16"), "narrow ones by dot products only"
    monkeypatch.setattr(plan, "has_amx", lambda: True)
    assert winograd(0.5) == (precision == "fp32"), "with AMX it was slower in bf16 wherever it was measured"


def test_compiled_files_are_kept_where_only_their_user_writes_or_where_torch_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(home: Path) -> str | None:
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        with machine():
            return os.environ.get("TORCHINDUCTOR_CACHE_DIR")

    monkeypatch.setenv("RESLAB_DATA", str(tmp_path / "shared"))
    monkeypatch.setattr(hardware, "cpu_mark", lambda: "one")
    own = tmp_path / ".cache" / "reslab" / "compiled-one"
    assert place(tmp_path) == str(own)
    assert own.stat().st_mode & 0o777 == 0o700
    assert place(Path("/proc")) is None


def test_what_a_plan_counts() -> None:
    assert Plan(105, 10, "fp32", "").epochs == 11
    assert Plan(100, 10, "fp32", "", step_seconds=4.0).steps_within(0.0, 0.0, done=50) == 51
    assert [low_size(size, share) for size, share in ((32, 0.9), (224, 0.57), (8, 0.7))] == [28, 124, 5]


def test_a_plan_knows_when_steps_take_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [planned(monkeypatch, lambda made: 1.0, compile="never", sam=sam, sam_from=0.75).twice_from for sam in (0.05, 0.0)]
    assert made == [0.75, 1.0]


def test_steps_at_both_sizes_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_time_step", lambda net, x, *rest: 1.0 if x.shape[2] == 16 else 0.25)
    recipe = resolve(Recipe(epochs=3, batch_size=8, micro_batch=4, precision="fp32", low_resolution=0.5, compile="never"), 80, 16, upright=False)
    with machine() as here:
        made = plan.make_plan(reslab.build("resnet20", num_classes=2), torch.randn(8, 3, 16, 16), recipe, train=80, val=16, macs=0, machine=here)
    assert (made.step_seconds, made.low_step_seconds) == (2.0, 0.5)


@pytest.mark.parametrize(("gain", "chosen"), [(1.2, "fp32"), (1.4, "bf16")])
def test_bf16_is_chosen_where_it_is_clearly_faster(gain: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((gain, 1.0))
    monkeypatch.setattr(plan, "_time", lambda work, x: next(times))
    here = SimpleNamespace(has_bf16=lambda: True, device=torch.device("cpu"))
    assert plan._choose_precision(10**9, here)[0] == chosen  # type: ignore[arg-type]
