"""A step in other ways: compiled, and on a GPU recorded. The numbers are those of the step as it is."""

import copy
from dataclasses import replace

import pytest
import torch

import reslab
from reslab.data.batches import Batches
from reslab.data.source import open_images
from reslab.nets.torch import ResNet
from reslab.train.hardware import Machine, machine
from reslab.train.optim import keep_gradients, optimizer, set_lr
from reslab.train.passes import Pass, ReplayedPass, ReplayedUpdate
from reslab.train.plan import Plan, ready
from reslab.train.recipe import Recipe

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def losses(net: ResNet, recipe: Recipe, plan: Plan, here: Machine, steps: int = 6) -> tuple[list[float], ResNet]:
    """Of some steps at two image sizes in turn; and the net afterwards."""
    own = copy.deepcopy(net).train()
    optim = optimizer(own, recipe)
    keep_gradients(own)
    work = Pass(ready(own, plan, recipe), recipe, plan.precision, here)
    run = ReplayedPass(work) if plan.replayed else work
    update = ReplayedUpdate(optim.step) if plan.replayed else optim.step
    found = []
    for step in range(steps):
        set_lr(optim, 0.01 * (step + 1))
        optim.zero_grad(set_to_none=False)
        side = (16, 12)[step % 2]
        x = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(step)).to(here.device, memory_format=torch.channels_last)
        targets = torch.nn.functional.one_hot(torch.arange(16, device=here.device) % 10, 10).float()
        loss, right = run(x, targets)
        update()
        assert 0 <= int(right) <= 16
        found.append(float(loss))
    return found, own


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
@needs_gpu
def test_a_recorded_step_is_the_step(name: str) -> None:
    recipe = Recipe(optimizer=name, lr=0.01, label_smoothing=0.1)  # type: ignore[arg-type]
    with machine() as here:
        torch.manual_seed(0)
        net = here.place(reslab.build("resnet20"))
        plan = Plan(6, 6, "bf16", "as asked")
        once, eager = losses(net, recipe, plan, here)
        again, recorded = losses(net, recipe, replace(plan, replayed=True), here)
    assert once == again
    for (key, a), b in zip(eager.state_dict().items(), recorded.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert once != losses(net, replace(recipe, label_smoothing=0.0), plan, here)[0]


@needs_gpu
def test_a_gpu_keeps_the_pixels_and_cuts_the_same_batches() -> None:
    images = open_images("digits")
    batches = Batches(images, torch.arange(100).numpy(), 8, "memory")
    near = list(batches.epoch(32, device=torch.device("cuda")))
    assert all(batch.pixels.is_cuda for batch in near)
    assert all(torch.equal(a.pixels, b.pixels.cpu()) for a, b in zip(batches.epoch(32), near, strict=True))


@needs_gpu
def test_a_seed_means_the_same_on_a_gpu(tmp_path: object) -> None:
    runs = [reslab.train("digits", "resnet20", f"{tmp_path}/{name}", epochs=2, seed=7) for name in "ab"]
    first, second = (reslab.load(run.path).net.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_cores_decode_where_a_gpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    gpu, cpu = Machine(torch.device("cuda")), Machine(torch.device("cpu"))
    assert (gpu.decoders, cpu.decoders) == (16, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert gpu.decoders == 4


def test_a_pass_adds_its_share_of_the_gradient() -> None:
    torch.manual_seed(0)
    net = reslab.build("resnet20").eval()
    x, targets = torch.randn(4, 3, 16, 16), torch.eye(10)[:4]
    with machine() as here:
        whole = Pass(net, Recipe(), "fp32", here)
        loss, _ = whole(x, targets)
        want = net.fc.weight.grad.clone()  # type: ignore[union-attr]
        half = Pass(net, Recipe(), "fp32", here, pieces=2)
        half(x, targets)
    assert torch.allclose(net.fc.weight.grad, 1.5 * want, rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(net(x), targets))


def test_a_step_repeats_and_each_part_of_it_shows() -> None:
    """What `losses` finds, on any machine; a recorded step is held against it."""
    recipe = Recipe(optimizer="sgd", lr=0.01, label_smoothing=0.1)
    torch.manual_seed(0)
    net, plan, here = reslab.build("resnet20", depths=(1, 1, 1)), Plan(6, 6, "fp32", "as asked"), Machine(torch.device("cpu"))
    once, after = losses(net, recipe, plan, here, steps=3)
    again, same = losses(net, recipe, plan, here, steps=3)
    assert once == again
    assert all(torch.equal(a, b) for a, b in zip(after.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(after.fc.weight, net.fc.weight)
    for other in (replace(recipe, label_smoothing=0.0), replace(recipe, norm_batch=8)):
        assert once != losses(net, other, plan, here, steps=3)[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_the_loss_is_the_cross_entropy_of_smoothed_targets_each_class_by_its_weight(smoothing: float, weights: list[float] | None) -> None:
    """Blended targets too, as mixup makes them; in fp64, from the definition."""
    torch.manual_seed(0)
    net = torch.nn.Linear(5, 3)
    x, targets = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.eye(3)[[0, 1, 2, 1]]
    targets[3] = torch.tensor([0.25, 0.75, 0.0])
    work = Pass(net, Recipe(label_smoothing=smoothing), "fp32", Machine(torch.device("cpu")), weights=torch.tensor(weights) if weights else None)
    loss, right = work(x, targets)
    logits = net(x).detach().double()
    logs = logits - logits.exp().sum(1, keepdim=True).log()
    wanted = (1 - smoothing) * targets.double() + smoothing / 3
    assert loss.item() == pytest.approx(-(torch.tensor(weights or [1.0] * 3) * wanted * logs).sum(1).mean().item(), rel=1e-6)
    assert right == (logits.argmax(1) == torch.tensor([0, 1, 2, 1])).sum()
