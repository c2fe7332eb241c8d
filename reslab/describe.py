"""What a training is made of, and what it says of itself: run.toml, the choices that the data made, and the lines before epoch 1."""

import shlex
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reslab.data.batches import Batches
from reslab.data.images import Images
from reslab.data.preprocess import VIEWS, Preprocess
from reslab.errors import shown
from reslab.limits import Limits
from reslab.spec import Spec
from reslab.train.hardware import Machine
from reslab.train.plan import Plan, low_size
from reslab.train.recipe import Recipe

PACKAGES = ("reslab", "torch", "numpy", "pillow", "scikit-learn", "simplejpeg", "safetensors")


@dataclass
class Job:
    """What both a fresh and a resumed training are made of."""

    images: Images
    spec: Spec
    recipe: Recipe
    preprocess: Preprocess
    parts: dict[str, Batches]
    storage: str  # which was chosen, and why
    machine: Machine


def run_config(job: Job, net: str, data: str, plan: Plan, limits: Limits) -> dict[str, Any]:
    """What run.toml holds. `data` is what was typed; `net` a name, or "custom"."""
    recipe, images = job.recipe, job.images
    given = f"--budget {limits.seconds:.12g}s " if limits.seconds else ""
    given += f"--memory {limits.memory} " if limits.memory else ""
    command = f"reslab train {shlex.quote(data)} --net {net} {given}{recipe.as_call}".strip()
    return {
        "command": shown(command),
        "net": net,
        "budget": limits.seconds,
        "spec": asdict(job.spec),
        "recipe": asdict(recipe),
        "plan": asdict(plan),
        "data": {
            "source": str(Path(images.source).resolve()) if images.paths is not None and "://" not in images.source else images.source,
            "name": images.name,
            "fingerprint": images.fingerprint(),
            "images": len(images),
            "classes": list(images.classes),
            **{name: len(items) for name, items in images.split.items()},
            "storage": job.storage,
            "decisions": _decisions(job),
        },
        "hardware": job.machine.describe(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _last_side(spec: Spec, size: int) -> int:
    return [layer.shape[1] for layer in spec.layers(size) if layer.name.startswith("layer")][-1]


def _decisions(job: Job) -> list[str]:
    """What was chosen because of the data, in words."""
    spec, recipe, images = job.spec, job.recipe, job.images
    size = recipe.image_size
    lines = [
        f"images are {size} x {size} px, {'greyscale' if images.channels == 1 else 'colour'}",
        f"stem {spec.stem}: the last stage sees {_last_side(spec, size or 0)} px a side",
        f"images are mirrored ({recipe.flip})"
        if recipe.flip != "none"
        else "images are not mirrored" + (": characters have a reading direction" if images.upright else ""),
        f"crop {recipe.crop}" + (f" of {recipe.pad} px" if recipe.crop == "pad" else ""),
        f"pixels kept in {job.storage}",
    ]
    if recipe.low_resolution:
        lines.append(f"the first {recipe.low_resolution:.0%} of the steps see {low_size(size or 0, recipe.low_size)} px, which costs less")
    if recipe.tta != "none":
        lines.append(
            f"tested and predicted by {VIEWS[recipe.tta]} views of an image, mirrored{' and shifted' * (recipe.tta == 'shifts')}: the mean of their answers"
        )
    if recipe.whiten:
        lines.append("the first convolution gives the principal components of the patches; it and its norm are not trained")
    if recipe.dirac:
        lines.append("convolutions in blocks that lose no channels begin as the identity")
    if recipe.micro_batch != recipe.batch_size:
        lines.append(f"a batch of {recipe.batch_size} goes through the net in pieces of {recipe.micro_batch}, each with its own batch norm")
    if recipe.norm_batch:
        lines.append(f"batch norm sees {recipe.norm_batch} images at a time")
    if recipe.sam:
        lines.append(f"the last {1 - recipe.sam_from:.0%} of the steps take their gradient uphill (SAM), in twice the time")
    return lines + [f"weights from {shown(recipe.weights)}"] * bool(recipe.weights)


def sentence(job: Job, net: str, plan: Plan) -> str:
    """What will be done and how long it will take, for a person, before it begins."""
    cost, images, recipe = job.spec.cost(job.recipe.image_size), job.images, job.recipe
    sizes = " / ".join(f"{len(images.split[name]):,} {name}" for name in ("train", "val", "test"))
    total = plan.seconds(plan.steps, recipe.low_resolution or 0.0)
    told = (
        f"{net}: {cost.params:,} parameters, {cost.macs / 1e6:,.1f} M multiply-adds at {recipe.image_size} px\n"
        f"{shown(images.name)}: {sizes}, {len(images.classes)} classes; {'; '.join(_decisions(job)[1:4])}\n"
        f"{plan.steps:,} steps, {plan.steps_per_epoch} an epoch, {1000 * plan.step_seconds:.0f} ms each in {plan.precision} "
        f"({plan.reason}): about {duration(total)}"
    )
    if plan.winograd:
        told += "\n3x3 convolutions by Winograd's algorithm (--convolution direct switches it off)"
    if plan.fusing:
        told += f"\nnorms by torch, which is slower than our kernels: {shown(plan.fusing)}"
    if plan.compiled:
        told += f"\nthe net is compiled: {plan.compiling} (--compile never switches it off)"
    if plan.replayed:
        told += "\nsteps are recorded once as CUDA graphs and replayed"
    if plan.segments:
        told += f"\nto stay within the memory, the first {sum(plan.segments)} of {sum(job.spec.depths)} blocks are computed twice a step"
    return told


def duration(total: float) -> str:
    """Seconds as a person says them."""
    if total < 100:
        return f"{total:.0f} s"
    return f"{total / 60:.0f} min" if total < 6000 else f"{total / 3600:.1f} h"
