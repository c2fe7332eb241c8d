"""Activation checkpointing: the same results, less memory, as many blocks as the budget demands."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import reslab
from reslab.catalogue.memory import Stretch, stretches
from reslab.limits import bytes_of
from reslab.nets.fused import use_fused
from reslab.spec import Spec
from reslab.train.checkpoint import Checkpointed, least, running_statistics_kept, segments_within
from reslab.train.hardware import Machine


def step(spec: Spec, segments: tuple[int, ...], precision: str = "fp32", kernels: bool = False, side: int = 32) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one training step, and every gradient and buffer that it leaves."""
    torch.manual_seed(0)
    net = reslab.build(spec).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    use_fused(net, kernels)
    x = torch.randn(4, spec.in_channels, side, side).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = Checkpointed(net, segments, 1)(x).float().logsumexp(1).sum()
    loss.backward()
    left = {f"{name}.grad": p.grad for name, p in net.named_parameters()} | dict(net.named_buffers())
    return loss.detach(), {name: tensor for name, tensor in left.items() if tensor is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["resnet20", "resnet110_stochastic", "wrn28-10-dropout", "resnet110_dropout_shortcut", "preact110", "resnet50_gn", "skipblock8"]
)
def test_loss_gradients_and_statistics_are_those_without_bit_for_bit(name: str, precision: str) -> None:
    spec = reslab.spec(name)
    spec = replace(spec, depths=(2, 2, 2), widths=(8, 16, 32), stem_width=0)
    whole_loss, whole = step(spec, (), precision)
    for segments in ((1, 1, 1), (4, 2)):
        loss, left = step(spec, segments, precision)
        assert torch.equal(loss, whole_loss)
        assert all(torch.equal(left[name], whole[name]) for name in whole)


def test_the_kernels_of_bottlenecks_give_the_same_bits_over_the_ends_of_segments() -> None:
    """Where a block's end is computed again, while the next block's entry remembers the first time."""
    spec = reslab.spec("resnet50", depths=(3, 1), widths=(64, 128), num_classes=4)
    whole_loss, whole = step(spec, (), "bf16", kernels=True, side=64)
    loss, left = step(spec, (2, 1), "bf16", kernels=True, side=64)
    assert torch.equal(loss, whole_loss)
    assert all(torch.equal(left[name], whole[name]) for name in whole)


def test_the_comparison_sees_statistics_that_are_updated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = reslab.spec("resnet20", depths=(2, 2, 2))
    _, whole = step(spec, ())
    monkeypatch.setattr(sys.modules[Checkpointed.__module__], "running_statistics_kept", lambda segment: nullcontext())
    _, left = step(spec, (4, 2))
    changed = {name for name in whole if not torch.equal(left[name], whole[name])}
    assert "layer1.0.bn1.running_mean" in changed
    assert not any(name.endswith(".grad") for name in changed)


def test_statistics_that_are_not_finite_are_kept_as_they_are() -> None:
    norm = nn.BatchNorm2d(1).train()
    assert norm.running_mean is not None
    norm.running_mean.fill_(float("inf"))
    with running_statistics_kept([norm]):
        norm(torch.full((2, 1, 1, 1), torch.nan))
    assert norm.running_mean.item() == float("inf")
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 0


def most_kept(net: nn.Module, segments: tuple[int, ...], x: Tensor) -> int:
    """The most bytes that a step holds at once beyond what it began with, by the profiler's list of every allocation and release."""
    from torch.profiler import ProfilerActivity, profile

    checkpointed = Checkpointed(net, segments, 1 << 40)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        checkpointed(x).logsumexp(1).sum().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_a_step_allocates_what_the_arithmetic_says() -> None:
    spec, batch = reslab.spec("resnet56"), 8
    parts = stretches(spec, 32, batch)
    net, x = reslab.build(spec).train(), torch.randn(batch, 3, 32, 32)
    flight = 4 * max(part.largest for part in parts)
    parameters = 4 * spec.cost().params
    for budget in (sum(part.kept for part in parts), sum(part.kept for part in parts) // 2, least(parts)):
        segments = segments_within(parts, budget)
        assert segments is not None
        net.zero_grad()
        assert most_kept(net, segments, x) <= budget + flight + parameters, f"{segments}"


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=3, max_size=12), st.integers(0, 400))
def test_no_other_tail_is_longer_and_the_budget_holds(sizes: list[tuple[int, int]], budget: int) -> None:
    """Against trying out every way to cut; what is kept is counted anew, from the definition. Outputs do not grow, as in nets."""
    outputs = sorted((output for _, output in sizes[1:]), reverse=True)
    parts = [Stretch(kept, output, 0) for (kept, _), output in zip(sizes, [sizes[0][1], *outputs], strict=True)]
    stem, blocks, head = parts[0], parts[1:-1], parts[-1]

    def needs(segments: tuple[int, ...]) -> int:
        begin, held, most = 0, stem.kept, 0
        for count in segments:
            held += parts[begin].output
            most = max(most, held + sum(block.kept for block in blocks[begin : begin + count]))
            begin += count
        held += parts[begin].output * bool(segments)
        return max(most, held + sum(block.kept for block in blocks[begin:]) + head.kept)

    def ways(left: int) -> list[tuple[int, ...]]:
        return [()] + [(first, *rest) for first in range(1, left + 1) for rest in ways(left - first)]

    found = segments_within(parts, budget)
    possible = [way for way in ways(min(len(blocks), 8)) if needs(way) <= budget]
    if found is None:
        assert not possible
    else:
        assert needs(found) <= budget
        assert sum(found) <= min((sum(way) for way in possible), default=len(blocks))


def test_a_run_with_little_memory_has_the_weights_of_one_with_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "held", lambda self: 0)
    fit, order = sys.modules["reslab.train.fit"], list[str]()
    save = fit.save_state
    monkeypatch.setattr(fit, "release_freed_memory", lambda: order.append("trim"))
    monkeypatch.setattr(fit, "save_state", lambda *state: (order.append("save"), save(*state)))
    given = {"epochs": 1, "batch_size": 256, "seed": 3}
    much = reslab.train("digits", out=tmp_path / "much", **given)
    with pytest.raises(reslab.CallError, match=r"--memory must hold a training step of 256 images, here (\d+\.\d\d) GiB") as caught:
        reslab.train("digits", out=tmp_path / "none", memory="1M", **given)
    assert not (tmp_path / "none").exists()
    need = str(caught.value).split("here ")[1].split(" ")[0]
    assert set(order) == {"save"}
    order.clear()
    little = reslab.train("digits", out=tmp_path / "little", memory=f"{need}G", **given)
    assert sum(little.config["plan"]["segments"]) > 0
    assert [before for before, what in pairwise(order) if what == "save"] == ["trim"] * order.count("save"), "saving was not counted into the budget"
    assert much.config["plan"]["segments"] == []
    ours, theirs = (load_file(run.model / "weights.safetensors") for run in (little, much))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("text", "size"), [("4G", 4 << 30), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("800 mb", 800 << 20), (4096, 4096)])
def test_amounts_of_memory(text: str | int, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1G", "0", "4X", "1e9", "9" * 30])
def test_what_is_no_amount_of_memory_is_one_line(text: str) -> None:
    with pytest.raises(reslab.CallError, match="--memory must be an amount such as 4G or 512M; received") as caught:
        bytes_of(text)
    assert "\n" not in str(caught.value)
