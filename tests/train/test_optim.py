import math

import pytest
import torch

import reslab
from reslab.train.optim import Average, Muon, _by_gram, _by_steps, lr_at, optimizer, orthogonal, set_lr, uphill
from reslab.train.recipe import RECIPES, Recipe
from tests.conftest import distance


def test_schedules_start_peak_and_end_where_they_should() -> None:
    one_cycle = Recipe(schedule="one-cycle", lr=1.0, warmup=0.25)
    assert [round(lr_at(one_cycle, p), 6) for p in (0, 0.125, 0.25, 0.625, 1)] == [0, 0.5, 1, 0.5, 0]
    cosine = Recipe(schedule="cosine", lr=2.0, warmup=0.0)
    assert [round(lr_at(cosine, p), 6) for p in (0, 0.5, 1)] == [2, 1, 0]
    paper = RECIPES["paper-cifar"]
    assert [round(lr_at(paper, s / 64_000), 9) for s in (0, 31_999, 32_000, 47_999, 48_000, 63_999)] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert math.isclose(lr_at(RECIPES["paper-imagenet"], 0.4, drops=2), 0.001)


def test_norms_and_biases_do_not_decay_unless_asked() -> None:
    net = reslab.build("resnet20")
    for recipe, decays in ((Recipe(optimizer="sgd"), False), (RECIPES["paper-cifar"], True)):
        groups = optimizer(net, recipe).param_groups
        flat = [g["weight_decay"] > 0 for g in groups for p in g["params"] if p.ndim == 1]
        assert all(flat) if decays else not any(flat)
        assert all(g["weight_decay"] > 0 for g in groups for p in g["params"] if p.ndim > 1)
        assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
    for all_of_them in (False, True):
        muon = optimizer(net, Recipe(optimizer="muon", decay_all=all_of_them)).param_groups
        assert {g["muon"]: g["weight_decay"] > 0 for g in muon} == {True: True, False: all_of_them}


def test_trunk_learns_slower_and_frozen_not_at_all() -> None:
    net = reslab.build("resnet20")
    optim = optimizer(net, Recipe(optimizer="sgd", trunk_lr=0.1))
    set_lr(optim, 0.5)
    rates = {id(p): g["lr"] for g in optim.param_groups for p in g["params"]}
    assert rates[id(net.fc.weight)] == 0.5
    assert rates[id(net.conv1.weight)] == pytest.approx(0.05)
    frozen = optimizer(net, Recipe(freeze="trunk"))
    assert {id(p) for g in frozen.param_groups for p in g["params"]} == {id(net.fc.weight), id(net.fc.bias)}
    assert not net.conv1.weight.requires_grad


def test_beside_muon_norms_and_head_have_their_own_rate_and_biases_a_multiple_of_it() -> None:
    net = reslab.build("resnet20")
    optim = optimizer(net, Recipe(optimizer="muon", sgd_lr=2.0, bias_lr=10.0))
    set_lr(optim, 0.5)
    rates = {id(p): g["lr"] for g in optim.param_groups for p in g["params"]}
    assert [rates[id(p)] for p in (net.conv1.weight, net.bn1.weight, net.bn1.bias, net.fc.weight, net.fc.bias)] == [0.5, 1.0, 10.0, 1.0, 1.0]


def test_uphill_is_a_radius_along_the_gradient_and_back_to_the_bit() -> None:
    net = reslab.build("resnet20")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    net.fc.bias.grad = None
    with pytest.raises(RuntimeError, match="also after an error"), uphill(net, 0.25):
        moves = {name: p.detach() - before[name] for name, p in net.named_parameters()}
        assert torch.cat([m.flatten() for m in moves.values()]).norm() == pytest.approx(0.25, rel=1e-4)
        ratios = torch.cat([(moves[name] / p.grad).flatten() for name, p in net.named_parameters() if p.grad is not None])
        assert ratios.median() > 0
        assert (ratios / ratios.median() - 1).abs().quantile(0.9) < 0.01, "rounding shows where the gradient is next to nothing"
        assert not moves["fc.bias"].any()
        raise RuntimeError("also after an error")
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_updates_have_nearly_equal_singular_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 3, 3, 3), (32, 16, 3, 3), (32, 16, 3, 3), (64, 32, 1, 1), (8, 64, 1, 1)]
    updates = [torch.randn(s, generator=generator) for s in shapes]
    for before, after in zip(updates, orthogonal(updates, dtype), strict=True):
        values = torch.linalg.svdvals(after.reshape(len(after), -1))
        assert (after.shape, after.dtype) == (before.shape, torch.float32)
        assert 0.5 < values.min() <= values.max() < 1.3
        u, _, v = torch.linalg.svd(before.reshape(len(before), -1), full_matrices=False)
        assert torch.nn.functional.cosine_similarity(after.flatten(), (u @ v).flatten(), dim=0) > 0.97


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01)])
def test_the_detour_by_the_gram_matrix_changes_the_rounding_only(dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 288, generator=generator, dtype=torch.float64) @ torch.diag(torch.logspace(0, -3, 288, dtype=torch.float64))
    right = _by_steps(x, torch.float64)
    assert distance(_by_gram(x.float(), dtype), right) < bound
    x[1, 3, 0] *= 2
    assert distance(_by_gram(x.float(), dtype), right) > bound, "one entry doubled"


def test_muon_multiplies_in_bf16_where_the_net_does() -> None:
    net = reslab.build("resnet20", num_classes=4)
    dtypes = [optimizer(net, Recipe(), precision).dtype for precision in ("fp32", "bf16")]  # type: ignore[attr-defined]
    assert dtypes == [torch.float32, torch.bfloat16]


def two_steps(recipe: Recipe) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A weight before, between and after two steps of rate 0.1, and the gradients of these, in fp64."""
    net = reslab.build("resnet20")
    optim, weight = optimizer(net, recipe), net.layer2[0].conv1.weight
    set_lr(optim, 0.1)
    weights, gradients = [weight.detach().double()], []
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        assert weight.grad is not None
        gradients.append(weight.grad.double())
        optim.step()
        weights.append(weight.detach().double())
    return weights, gradients


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_steps_as_sutskever_et_al_write_it(nesterov: bool) -> None:
    """In the form of torch, 1308.6000's with the rate outside of the velocity; L2 is part of the gradient."""
    weights, gradients = two_steps(Recipe(optimizer="sgd", momentum=0.8, nesterov=nesterov, weight_decay=0.3))
    held = torch.zeros(())
    for before, after, gradient in zip(weights, weights[1:], gradients, strict=False):
        gradient = gradient + 0.3 * before
        held = 0.8 * held + gradient
        assert distance(after - before, -0.1 * (gradient + 0.8 * held if nesterov else held)) < 1e-5


def test_adamw_steps_as_loshchilov_and_hutter_write_it() -> None:
    """1711.05101, algorithm 2: the decay is beside the gradient."""
    weights, gradients = two_steps(Recipe(optimizer="adamw", weight_decay=0.3))
    mean = square = torch.zeros(())
    for t, (before, after, gradient) in enumerate(zip(weights, weights[1:], gradients, strict=False), start=1):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        step = mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        assert distance(after - before, -0.1 * (step + 0.3 * before)) < 1e-5


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_every_optimiser_lowers_a_loss(name: str) -> None:
    torch.manual_seed(0)
    net = reslab.build("resnet20", num_classes=4)
    x, y = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
    optim = optimizer(net, Recipe(optimizer=name, lr=0.02 if name != "adamw" else 0.002))
    set_lr(optim, 0.02 if name != "adamw" else 0.002)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(net(x), y)
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_average_follows_the_weights_and_their_statistics() -> None:
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    average = Average(net, 0.9)
    with torch.no_grad():
        net[0].weight.fill_(3)
        net[0].running_mean.fill_(5)
    for step in range(1, 200):
        average.update(net, step)
    assert torch.allclose(average.tensors["0.weight"], torch.tensor(3.0), atol=1e-3)
    assert torch.allclose(average.tensors["0.running_mean"], torch.tensor(5.0), atol=1e-3)


def test_the_average_is_the_written_recursion_over_changing_weights() -> None:
    """Its decay is (1 + step) / (10 + step) where that is less."""
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    average = Average(net, 0.22)
    want = net[0].weight.detach().double()
    for step, decay in ((1, 2 / 11), (2, 0.22), (3, 0.22)):
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([2.0, -1.0]) ** step)
            net[0].num_batches_tracked.fill_(step)
        average.update(net, step)
        want = decay * want + (1 - decay) * net[0].weight.detach().double()
        assert average.tensors["0.weight"].tolist() == pytest.approx(want.tolist(), rel=1e-6)
        assert average.tensors["0.num_batches_tracked"] == step


def test_two_steps_of_muon_are_the_written_formula() -> None:
    """Nesterov momentum, then decay and the orthogonal update for matrices; in fp64, by the polynomial of Jordan et al. 2024."""
    generator = torch.Generator().manual_seed(0)
    filters, scale = (torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3, 3, 3), (6,)))
    rows = [{"params": [filters], "muon": True, "weight_decay": 0.1}, {"params": [scale], "muon": False, "weight_decay": 0.0}]
    optim = Muon([{**row, "lr": 0.2} for row in rows], 0.2, 0.6, torch.float32)
    want = [p.detach().double() for p in (filters, scale)]
    held = [torch.zeros_like(p) for p in want]

    def made_orthogonal(update: torch.Tensor) -> torch.Tensor:
        x = update.flatten(1) / update.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.view_as(update)

    for _ in range(2):
        for p in (filters, scale):
            p.grad = torch.randn(p.shape, generator=generator)
        optim.step()
        gradients = [p.grad.double() for p in (filters, scale)]  # type: ignore[union-attr]
        held = [0.6 * m + g for m, g in zip(held, gradients, strict=True)]
        updates = [g + 0.6 * m for g, m in zip(gradients, held, strict=True)]
        want = [(1 - 0.2 * 0.1) * want[0] - 0.2 * made_orthogonal(updates[0]), want[1] - 0.2 * updates[1]]
        for p, wanted in zip((filters, scale), want, strict=True):
            assert distance(p, wanted) < 1e-5
