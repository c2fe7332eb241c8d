"""Where in an image the evidence for a class lies, and whether such a map says anything about the net at all.

    grad-cam               Selvaraju et al. 2016 (1610.02391), equations 1 and 2
    grad-cam++             Chattopadhyay et al. 2017 (1710.11063), equations 10 and 19
    integrated-gradients   Sundararajan et al. 2017 (1703.01365), equation 1
    occlusion              Zeiler & Fergus 2013 (1311.2901), section 4.2

`x` is what a net is fed, float (N, C, H, W); `labels` the class each map is for, int64 (N). Maps are signed: what is
positive speaks for the class. The control is a map of the same net with fresh weights (Adebayo et al. 2018, 1810.03292):
a method whose maps look the same there draws the image, not the net.

Nothing here changes a net: gradients go to activations and images, never to parameters, and each module is left in the
mode it was in, also after an exception.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from reslab.data.decode import Pixels
from reslab.data.preprocess import Preprocess
from reslab.errors import CallError, shown, unknown
from reslab.layout import start_scales
from reslab.nets.parts import Scale
from reslab.nets.torch import ResNet
from reslab.use.classifier import BATCH, Classifier

METHODS = ("grad-cam", "grad-cam++", "integrated-gradients", "occlusion")
PLACED = ("grad-cam", "grad-cam++")  # those that work on activations, at a place in the net
LAST = "last"  # the output of the last block
STEPS = 50  # of the integral, at Gauss-Legendre nodes
MEMORY = 1 << 29  # bytes of activations that may live at once
PEAK = 0.99  # the quantile of a map that is drawn as its peak: single pixels must not darken the rest

Floats = NDArray[np.float32]


def heat_map(classifier: Classifier, pixels: Pixels, method: str = "grad-cam", at: str = LAST, label: str | None = None) -> Floats:
    """Where one image speaks for a class: float32 (canvas, canvas) in [0, 1], zero where the net does not look.

    `pixels` is what `Classifier.decode` gave, uint8 (canvas, canvas, C); `label` a class name, by default the predicted.
    `at` is a stage, such as layer3, a block, such as layer3.0, "stem" or "last". Raises CallError for unknown names.
    """
    batch = torch.from_numpy(pixels.copy())[None]
    index = int(classifier.logits(pixels[None]).argmax()) if label is None else class_index(classifier, label)
    heat: Floats = heat_maps(classifier, batch, torch.tensor([index]), method, at)[0]
    return heat


def heat_maps(classifier: Classifier, pixels: Tensor, labels: Tensor, method: str = "grad-cam", at: str = LAST) -> Floats:
    """`heat_map` of a batch: uint8 (N, canvas, canvas, C) and a class index each -> float32 (N, canvas, canvas)."""
    return on_canvas(classifier, evidence(classifier.net, prepared(classifier, pixels), labels, method, at))


def prepared(classifier: Classifier, pixels: Tensor) -> Tensor:
    """What the net is fed for uint8 (N, canvas, canvas, C), on its device."""
    device = next(classifier.net.parameters()).device
    assert isinstance(classifier.preprocess, Preprocess)  # where there is a net, there is
    return classifier.preprocess(pixels, device).contiguous(memory_format=torch.channels_last)


def class_index(classifier: Classifier, label: str) -> int:
    """The index of a class name. Raises CallError with the nearest name."""
    if label not in classifier.classes:
        raise unknown("class", label, map(shown, classifier.classes))
    return classifier.classes.index(label)


def place(net: ResNet, at: str) -> str:
    """The name in a net's outputs that `at` means: a stage means its last block. Raises CallError with the nearest name."""
    stages = {f"layer{number}": len(stage) for number, stage in enumerate(net.stages, start=1)}
    blocks = [f"{name}.{index}" for name, depth in stages.items() for index in range(depth)]
    if at in ("stem", *blocks):
        return at
    if at != LAST and at not in stages:
        raise unknown("place", at, ["stem", *stages, LAST], f" (blocks are {blocks[0]} to {blocks[-1]})")
    last = list(stages)[-1] if at == LAST else at
    return f"{last}.{stages[last] - 1}"


def check_method(net: ResNet, method: str, at: str) -> None:
    """Raises CallError for a method or place that does not exist, or for a place given to a method that has none."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    place(net, at)
    if at != LAST and method not in PLACED:
        raise CallError(f"--at chooses the activations that grad-cam and grad-cam++ weigh; {method} works on pixels: leave --at {at} out")


def evidence(net: ResNet, x: Tensor, labels: Tensor, method: str = "grad-cam", at: str = LAST) -> Tensor:
    """Signed maps at the method's own grain, float32 (N, h, w) on the CPU. Raises CallError as `check_method`."""
    check_method(net, method, at)
    of: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "grad-cam": partial(grad_cam, net, at=at),
        "grad-cam++": partial(grad_cam_plus_plus, net, at=at),
        "integrated-gradients": lambda images, classes: integrated_gradients(net, images, classes).sum(1),
        "occlusion": partial(occlusion, net),
    }
    labels = labels.to(x.device)
    together = _together(net, x)
    parts = zip(torch.split(x, together), torch.split(labels, together), strict=True)
    maps = torch.cat([of[method](images, classes).float().cpu() for images, classes in parts])
    return maps.nan_to_num(0, 0, 0)  # what overflows, as in a deep net without norms, is no evidence


def grad_cam(net: ResNet, x: Tensor, labels: Tensor, at: str = LAST) -> Tensor:
    """Channels weighed by the mean gradient of the class's logit: (N, h, w) of the activations at `at`."""
    activations, gradients = _at(net, x, labels, place(net, at))
    return (gradients.mean((2, 3), keepdim=True) * activations).sum(1)


def grad_cam_plus_plus(net: ResNet, x: Tensor, labels: Tensor, at: str = LAST) -> Tensor:
    """As Grad-CAM, each pixel's gradient g weighed by g^2 / (2 g^2 + g^3 sum A), which is 1 / (2 + g sum A), where g > 0.

    The sum is over positive activations: those of a pre-activation net can be negative, where the formula has a pole.
    """
    activations, gradients = _at(net, x, labels, place(net, at))
    rising = gradients.relu()
    weights = rising / (2 + rising * activations.relu().sum((2, 3), keepdim=True))
    return (weights.sum((2, 3), keepdim=True) * activations).sum(1)


def integrated_gradients(net: ResNet, x: Tensor, labels: Tensor, steps: int = STEPS) -> Tensor:
    """Each input's share in the difference of the logit from that of the mean colour, `x` = 0: (N, C, H, W).

    Shares add up to the difference, up to the error of the integral.
    """
    together = _together(net, x)
    nodes, sizes = np.polynomial.legendre.leggauss(steps)
    with _as_found(net):
        total = torch.zeros_like(x)
        for i, (image, label) in enumerate(zip(x.detach().clone(), labels.tolist(), strict=True)):
            alphas, weights = (image.new_tensor(v / 2).view(-1, 1, 1, 1) for v in (nodes + 1, sizes))
            for some, share in zip(torch.split(alphas, together), torch.split(weights, together), strict=True):
                points = (some * image).requires_grad_()
                (gradients,) = torch.autograd.grad(net(points)[:, label].sum(), points)
                total[i] += (share * gradients).sum(0) * image
    return total


def occlusion(net: ResNet, x: Tensor, labels: Tensor, window: int | None = None, stride: int | None = None) -> Tensor:
    """How far the logit falls when a square is painted in the mean colour, averaged over the squares on a pixel: (N, H, W).

    `window` is its side, by default a fifth of the image's; `stride` how far it moves, by default half of that.
    """
    together = _together(net, x)
    window = window or max(1, x.shape[2] // 5)
    masks = _squares(x.shape[2], x.shape[3], window, stride or max(1, window // 2)).to(x)
    maps = []
    with _as_found(net), torch.no_grad():
        for image, label in zip(x.detach(), labels.tolist(), strict=True):
            whole = net(image[None])[:, label]
            falls = [whole - net(image * (1 - some[:, None]))[:, label] for some in torch.split(masks, together)]
            maps.append((torch.cat(falls).view(-1, 1, 1) * masks).sum(0) / masks.sum(0))
    return torch.stack(maps)


def on_canvas(classifier: Classifier, maps: Tensor) -> Floats:
    """Signed maps (N, h, w) -> float32 (N, canvas, canvas) in [0, 1]: what speaks for the class, relative to its peak.

    The net sees the middle of the canvas; around it there is no heat. A map without any positive evidence is all zero.
    """
    size, canvas = classifier.preprocess.image_size, classifier.preprocess.canvas
    rising = F.interpolate(maps.relu()[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
    flat = rising.flatten(1)
    peak = flat.kthvalue(max(1, round(PEAK * flat.shape[1])), dim=1).values
    peak = torch.where(peak > 0, peak, flat.amax(1)).clamp(min=torch.finfo(torch.float32).tiny)
    out = np.zeros((len(maps), canvas, canvas), np.float32)
    start = (canvas - size) // 2
    out[:, start : start + size, start : start + size] = (rising / peak.view(-1, 1, 1)).clamp(max=1).numpy()
    return out


def reinitialised(net: ResNet, seed: int = 0) -> ResNet:
    """The same network with fresh random weights, for the control; the global random state is left as it was.

    Its batch norms are set to the statistics of noise: with those of a fresh net, activations double from block to block. What
    starts at zero (Fixup, SkipInit, ReZero) is random too, for a branch that yields nothing compares nothing.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        fresh = ResNet(replace(net.spec, zero_init=False)).eval()
        _fill(fresh)
        side = net.spec.flatten or max(32, 4 * net.spec.reduction)
        noise = torch.randn(8, net.spec.in_channels, side, side)
    norms = [module for module in fresh.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        fresh(noise)
    fresh.eval()
    return fresh.to(next(net.parameters()).device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@torch.no_grad()
def _fill(fresh: ResNet) -> None:
    """Gives what starts at zero random values, so small that a deep net without norms stays finite."""
    share = sum(fresh.spec.depths) ** -0.5
    for name, scale in start_scales(fresh.spec).items():
        if scale == 0:
            module = fresh.get_submodule(name)
            assert isinstance(module, nn.Conv2d | nn.Linear)
            module.reset_parameters()
            module.weight.mul_(share)
    for module in fresh.modules():
        if isinstance(module, Scale):
            module.weight.fill_(share)


def rank_correlation(maps: Tensor, others: Tensor, magnitude: bool = False) -> list[float | None]:
    """Spearman's correlation of each map (N, h, w) with its other, of the positive part, which is what gets drawn.

    1 is the same map, 0 an unrelated one; None where one of the two is constant and so ranks nothing. With `magnitude`, that
    of the maps without their signs where it is larger: at random weights signs change, and what is left is the image
    (Adebayo et al. 2018, 1810.03292, who report both).
    """
    found = []
    for one, other in zip(maps.numpy(), others.numpy(), strict=True):
        pairs = [(one.clip(0), other.clip(0)), *([(np.abs(one), np.abs(other))] if magnitude else [])]
        found.append(max((value for pair in pairs if (value := _spearman(*pair)) is not None), default=None))
    return found


def _spearman(one: NDArray[np.float32], other: NDArray[np.float32]) -> float | None:
    a, b = (ranks - ranks.mean() for ranks in (rankdata(one), rankdata(other)))
    spread = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / spread if spread else None


@contextmanager
def _as_found(net: nn.Module) -> Iterator[None]:
    """The net in eval mode and gradients recorded, whatever the caller's mode; afterwards all is as it was."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        net.eval()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _at(net: ResNet, x: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The activations (N, C, h, w) of that name, and the gradient of the class's logit with respect to them."""
    outputs: dict[str, Tensor] = {}
    with _as_found(net):
        logits = net(x.detach().clone().requires_grad_(), outputs)
        score = logits.gather(1, labels.clone()[:, None]).sum()
        (gradients,) = torch.autograd.grad(score, outputs[name])
    return outputs[name].detach(), gradients


def _squares(height: int, width: int, side: int, stride: int) -> Tensor:
    """One mask (H, W) for each place of the square, ones where it hides; the last of a row or column may be cut off."""
    rows, columns = (range(0, max(0, length - side + stride - 1) // stride * stride + 1, stride) for length in (height, width))
    masks = torch.zeros(len(rows) * len(columns), height, width)
    for mask, (top, left) in zip(masks, ((r, c) for r in rows for c in columns), strict=True):
        mask[top : top + side, left : left + side] = 1
    return masks


def _together(net: ResNet, x: Tensor) -> int:
    """How many images may go through the net at once."""
    return int(max(1, min(BATCH, MEMORY // net.spec.cost((x.shape[2], x.shape[3])).activations)))
