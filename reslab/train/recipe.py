"""How to train, as frozen data. A recipe is a row; rows derive from rows by `replace`.

A field that is None follows the data set; `resolve` fills it in, and the filled-in recipe is what a run records.
"""

import math
import shlex
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from reslab.errors import CallError, unknown

Optimizer = Literal["sgd", "adamw", "muon"]
Flip = Literal["none", "random", "alternate"]
Schedule = Literal["cosine", "one-cycle", "step", "plateau"]
Crop = Literal["pad", "resized", "scale", "none"]
Balance = Literal["none", "weights", "sampling"]
Precision = Literal["auto", "fp32", "bf16"]
Freeze = Literal["none", "trunk"]
Normalize = Literal["channel", "pixel-mean"]
Keep = Literal["best", "last"]
Place = Literal["auto", "memory", "stream"]
Convolution = Literal["auto", "direct"]
Edge = Literal["zero", "reflect"]
Tta = Literal["none", "mirror", "shifts"]
Compile = Literal["auto", "always", "never"]
Fuse = Literal["auto", "never"]

PLATEAU = 10  # epochs without a better val top-1 before the plateau schedule lowers the rate


class Help(NamedTuple):
    """What a field means, for `--help`, and the range of its number where it has one."""

    text: str
    low: float = 0
    high: float = 0


@dataclass(frozen=True)
class Recipe:
    """Each field is a command-line option of the same name: `label_smoothing` is `--label-smoothing`."""

    epochs: Annotated[int | None, Help("passes over the training images; by default about 1.4 million images, 15 to 60 passes", 1, 10**6)] = None
    steps: Annotated[int | None, Help("steps in all, instead of whole epochs", 1, 10**9)] = None
    batch_size: Annotated[int | None, Help("images a step; by default 128, less for a small data set", 1, 10**6)] = None
    micro_batch: Annotated[
        int | None, Help("of these, so many go through the net at once, and batch norm sees no more; by default a process's share", 1, 10**6)
    ] = None
    norm_batch: Annotated[int | None, Help("of these again, so many does batch norm see at once; by default a micro-batch", 1, 10**6)] = None
    optimizer: Annotated[Optimizer, Help("SGD with momentum, AdamW, or Muon for the convolutions and SGD for the rest")] = "muon"
    lr: Annotated[float, Help("the highest learning rate", 0, 1e3)] = 0.05
    sgd_lr: Annotated[float, Help("with Muon: the learning rate of norms and head, as a multiple of lr", 0, 1e3)] = 5.0
    bias_lr: Annotated[float, Help("the learning rate of the trunk's biases, as a multiple of what it would be", 0, 1e3)] = 1.0
    momentum: Annotated[float, Help("of SGD and Muon", 0, 1)] = 0.9
    nesterov: Annotated[bool, Help("SGD looks ahead; Muon always does")] = True
    weight_decay: Annotated[float, Help("L2 for SGD, decoupled for AdamW and Muon", 0, 1e3)] = 0.02
    decay_all: Annotated[bool, Help("also decay norms and biases, and with Muon the head")] = False
    schedule: Annotated[Schedule, Help("how the learning rate falls")] = "one-cycle"
    warmup: Annotated[float, Help("share of the training in which it rises linearly from zero", 0, 1)] = 0.2
    warmup_lr: Annotated[float, Help("instead of that: held here until the training error falls below 80 % (He 2015, n = 18)", 0, 1e3)] = 0.0
    milestones: Annotated[tuple[float, ...], Help("of the step schedule, as shares of the training: between 0 and 1")] = (0.5, 0.75)
    label_smoothing: Annotated[float, Help("share of the target spread over all classes", 0, 1)] = 0.0
    mixup: Annotated[float, Help("alpha of mixup; 0 is off", 0, 100)] = 0.0
    cutmix: Annotated[float, Help("alpha of cutmix; with both, each batch gets one of them", 0, 100)] = 0.0
    ema: Annotated[float, Help("decay of an average of the weights, which is then what is kept; 0 is off", 0, 1)] = 0.0
    sam: Annotated[float, Help("radius of sharpness-aware minimisation: the gradient is taken that far uphill; 0 is off", 0, 1e3)] = 0.0
    sam_from: Annotated[float, Help("share of the training before it begins; from then on a step takes twice as long", 0, 1)] = 0.0
    clip: Annotated[float, Help("largest norm of the gradient; 0 is off", 0, 1e9)] = 0.0
    balance: Annotated[Balance, Help("rare classes weighted in the loss, or sampled more often")] = "none"
    patience: Annotated[int, Help("stop after so many epochs without a better val top-1; 0 is off", 0, 10**6)] = 0
    keep: Annotated[Keep, Help("the weights of the best epoch on val, or of the last")] = "best"
    weights: Annotated[str, Help("a file, folder, https address or hf:owner/name to start from")] = ""
    freeze: Annotated[Freeze, Help("train the head only")] = "none"
    trunk_lr: Annotated[float, Help("learning rate of all but the head, as a share of lr", 0, 1e3)] = 1.0
    zero_init: Annotated[bool | None, Help("each residual branch starts at zero; by default as the net says")] = None
    whiten: Annotated[bool, Help("the first convolution gives the principal components of the images' patches; it and its norm stay so")] = False
    dirac: Annotated[bool, Help("3x3 convolutions in blocks that lose no channels begin as the identity")] = False
    image_size: Annotated[int | None, Help("pixels a side; by default what the images have, at most 224", 1, 4096)] = None
    low_resolution: Annotated[float | None, Help("share of the steps, the first, with smaller images; by default half from 32 px up", 0, 1)] = None
    low_size: Annotated[float, Help("size of these, as a share of the image size", 0.05, 1)] = 0.75
    crop: Annotated[Crop | None, Help("pad and shift / random resized / He's scale jitter / none; by default by image size")] = None
    pad: Annotated[int | None, Help("pixels of shift of the crop `pad`; by default an eighth of the image", 0, 4096)] = None
    edge: Annotated[Edge, Help("what comes in where an image is shifted: zeros, or its own pixels reflected")] = "zero"
    flip: Annotated[Flip | None, Help("mirror left to right at random, or every other epoch; by default not for digits and letters")] = None
    cutout: Annotated[int, Help("pixels a side, at full size, of a square set to zero; 0 is off", 0, 4096)] = 0
    tta: Annotated[Tta, Help("test and predict with mirror images too, where training mirrors, or also shifted by a pixel: two or six times the time")] = "none"
    jitter: Annotated[float, Help("strength of colour jitter; 0 is off", 0, 1)] = 0.0
    lighting: Annotated[float, Help("standard deviation of AlexNet's colour shift along the principal components; 0 is off", 0, 10)] = 0.0
    randaugment: Annotated[int, Help("operations of RandAugment; 0 is off", 0, 10)] = 0
    normalize: Annotated[Normalize, Help("mean and deviation of each channel, or the mean image")] = "channel"
    precision: Annotated[Precision, Help("bf16 where it is faster")] = "auto"
    convolution: Annotated[Convolution, Help("on a CPU: Winograd's algorithm where that is faster, or all direct")] = "auto"
    fuse: Annotated[Fuse, Help("on a CPU: norm, addition and ReLU in one pass, with a C compiler, and in bf16 quicker convolutions; or all by torch")] = "auto"
    compile: Annotated[Compile, Help("torch.compile where it is repaid within the training; always, never")] = "auto"
    save_every: Annotated[float, Help("seconds of training that a crash may cost", 0, 1e6)] = 60.0
    val: Annotated[float | None, Help("share of the images held out as val, where none is given; by default a tenth, 2,500 at most", 0.001, 0.5)] = None
    storage: Annotated[Place, Help("pixels in memory, or decoded by workers as they are needed")] = "auto"
    seed: Annotated[int, Help("of every random choice", 0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        for name, help_ in helps().items():
            value = getattr(self, name)
            if value is not None and help_.high > help_.low and not help_.low <= value <= help_.high:
                raise CallError(f"{name} must be from {help_.low:g} to {help_.high:g}; received {value}")

    @property
    def as_call(self) -> str:
        """The options that make this recipe from the default one, as typed on a command line."""
        parts = []
        for f in fields(self):
            value, flag = getattr(self, f.name), f.name.replace("_", "-")
            if value != f.default and not (f.name == "epochs" and self.steps):  # of both the steps count
                if isinstance(value, bool):
                    parts.append(f"--{flag}" if value else f"--no-{flag}")
                elif isinstance(value, tuple):
                    parts += [f"--{flag} {v}" for v in value] or [f"--empty-{flag}"]
                else:
                    parts.append(f"--{flag} {shlex.quote(str(value))}")
        return " ".join(parts)


@cache
def helps() -> dict[str, Help]:
    """The Help of every field."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(Recipe, include_extras=True).items()}


QUICK = Recipe()
PAPER = Recipe(
    optimizer="sgd", lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4, decay_all=True, warmup=0.0, low_resolution=0.0, keep="last"
)  # fmt: skip

RECIPES: dict[str, Recipe] = {
    # Command, time, result, n and hardware of each are in docs/recipes.md, written from runs.
    "quick": QUICK,
    # He 2015, section 4.2: 64k steps of 128, lr / 10 at 32k and 48k
    "paper-cifar": replace(PAPER, steps=64_000, batch_size=128, schedule="step", crop="pad", pad=4, flip="random", normalize="pixel-mean"),
    # He 2015, section 3.4: 600k steps of 256, lr / 10 on plateau, short side in [256, 480], AlexNet's colour shift
    "paper-imagenet": replace(
        PAPER,
        steps=600_000,
        batch_size=256,
        schedule="plateau",
        image_size=224,
        crop="scale",
        flip="random",
        normalize="pixel-mean",
        lighting=0.1,
    ),
    "finetune": replace(QUICK, epochs=15, optimizer="sgd", lr=0.05, trunk_lr=0.3, schedule="cosine", warmup=0.1, weight_decay=1e-4, low_resolution=0.0),
}
# For CIFAR-10 in little time: whitening, fast biases, alternating flips, reflected edges, smoothed labels and six views as in airbench
# (Jordan 2024, 2404.00498), Muon's large steps, and half the resolution for the first part
RECIPES["sprint"] = replace(
    QUICK,
    epochs=13,
    batch_size=500,
    lr=0.2,
    sgd_lr=1.5,
    bias_lr=160.0,
    momentum=0.6,
    weight_decay=0.03,
    label_smoothing=0.2,
    whiten=True,
    dirac=True,
    tta="shifts",
    pad=2,
    edge="reflect",
    low_resolution=0.4,
    low_size=0.5,
    keep="last",
    val=0.01,
)
# Towards 95 %: a wider net for longer, with larger shifts, more decay, noisier norms and, late, a search for a flat minimum, which is
# enough (Foret et al. 2021, 2010.01412; Zhou et al. 2025, 2410.10373)
RECIPES["sprint-95"] = replace(RECIPES["sprint"], epochs=20, pad=4, weight_decay=0.04, norm_batch=125, sam=0.25, sam_from=0.8)
# Towards 96 %: twice the blocks for twice as long, with cutout
RECIPES["sprint-96"] = replace(RECIPES["sprint-95"], epochs=45, lr=0.12, momentum=0.85, cutout=12, sam_from=0.75)
# The same with lr 0.01 until the training error is below 80 %, as the paper trains 110 layers
RECIPES["paper-cifar-110"] = replace(RECIPES["paper-cifar"], warmup_lr=0.01)

# The net that a recipe was made for; it is taken where none is named
MADE_FOR = {"sprint": "resnet8", "sprint-95": "wide_resnet8", "sprint-96": "wide_resnet14", "paper-cifar-110": "resnet110"}


def made_for(recipe: str | Recipe) -> str | None:
    """The net that a recipe of that name was made for."""
    return MADE_FOR.get(recipe) if isinstance(recipe, str) else None


def find_recipe(recipe: str | Recipe, **changes: Any) -> Recipe:
    """A recipe by name, from a TOML file of Recipe fields, or as given; with `changes` applied where they are not None.

    Raises CallError with the nearest name for an unknown recipe or field, and for a value of the wrong type.
    """
    known = [f.name for f in fields(Recipe)]
    if isinstance(recipe, str) and recipe.endswith(".toml"):
        recipe = from_dict(_read_toml(Path(recipe)))
    elif isinstance(recipe, str):
        if recipe not in RECIPES:
            raise unknown("recipe", recipe, RECIPES, ", or give a .toml file")
        recipe = RECIPES[recipe]
    for name in changes:
        if name not in known:
            raise unknown("recipe field", name, known)
    given = {name: value for name, value in changes.items() if value is not None}
    _check_length(given)
    if "steps" in given:
        given["epochs"] = None  # else the recipe's own epochs would count
    made = from_dict({**{name: getattr(recipe, name) for name in known}, **given})
    _check_schedule(made)
    return made


def _check_schedule(recipe: Recipe) -> None:
    """Refuses what would do nothing; a recorded recipe, which may be older than the rule, is read without."""
    if not all(0 < share < 1 for share in recipe.milestones):
        raise CallError(f"milestones must be shares of the training, between 0 and 1; received {', '.join(f'{m:g}' for m in recipe.milestones)}")
    if recipe.schedule == "plateau" and 0 < recipe.patience <= PLATEAU:
        raise CallError(
            f"the plateau schedule lowers the rate after {PLATEAU} epochs without a better val top-1; received --patience {recipe.patience}, which stops "
            "before that is of use: give more, or leave it out"
        )


def from_dict(values: dict[str, Any]) -> Recipe:
    """A Recipe from plain values, with every field checked. Raises CallError."""
    import cattrs

    converter = cattrs.Converter(forbid_extra_keys=True, prefer_attrib_converters=True)
    for kind in (int, float, bool):
        converter.register_structure_hook(kind, _strict_number)
    try:
        return converter.structure(values, Recipe)
    except cattrs.BaseValidationError as error:
        for told in error.exceptions:
            if isinstance(told, CallError):
                raise told from None
        first = cattrs.transform_error(error, format_exception=lambda e, _: str(e))[0]
        raise CallError(f"a recipe field cannot hold this: {first}; `reslab train --help` lists what each holds") from error


def _strict_number(value: Any, kind: type) -> Any:
    fits = isinstance(value, bool) if kind is bool else isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or (kind is int and value != int(value)):
        raise ValueError(f"must be {kind.__name__}, received {value!r}")
    return kind(value)


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CallError(f"a recipe file must be TOML of recipe fields; {path} cannot be read: {error}") from error
    known = [f.name for f in fields(Recipe)]
    for name in values:
        if name not in known:
            raise unknown("recipe field", name, known)
    _check_length(values)
    return values


def _check_length(given: dict[str, Any]) -> None:
    if "steps" in given and "epochs" in given:
        raise CallError(f"steps and epochs both say how long a training is; received {given['steps']} and {given['epochs']}: leave one out")


def resolve(recipe: Recipe, train_images: int, image_size: int, upright: bool, processes: int = 1) -> Recipe:
    """The recipe with every field that follows the data filled in. Raises CallError for a batch that the data cannot fill."""
    size = recipe.image_size or image_size
    batch = recipe.batch_size or max(2, min(128, train_images // 16)) // processes * processes or processes
    if batch > train_images:
        raise CallError(f"a batch must not be larger than the training data: batch_size {batch}, {train_images} images; lower --batch-size")
    micro = recipe.micro_batch or batch // processes
    check_shares(batch, micro, processes)
    if recipe.norm_batch and micro % recipe.norm_batch:
        raise CallError(f"batch norm sees a micro-batch in equal parts; {micro} images by {recipe.norm_batch} does not go: change --norm-batch")
    by_steps = math.ceil(recipe.steps / (train_images // batch)) if recipe.steps else None
    epochs = recipe.epochs or by_steps or max(15, min(60, round(1_400_000 / train_images)))
    crop = recipe.crop or ("pad" if size <= 64 else "resized")
    pad, edge = (recipe.pad, recipe.edge) if crop == "pad" else (0, "zero")  # nothing is shifted by other crops
    pad = size // 8 if pad is None else pad
    if edge == "reflect" and pad >= size:
        raise CallError(f"an image is reflected by less than its size; received --pad {pad} for {size} px: lower it, or leave out --edge reflect")
    flip: Flip = recipe.flip or ("none" if upright else "alternate")
    return replace(
        recipe,
        image_size=size,
        batch_size=batch,
        micro_batch=micro,
        epochs=epochs,
        steps=None if recipe.epochs else recipe.steps,
        crop=crop,
        low_resolution=(0.5 if size >= 32 else 0.0) if recipe.low_resolution is None else recipe.low_resolution,
        pad=pad,
        edge=edge,
        warmup=0.0 if recipe.warmup_lr else recipe.warmup,
        flip=flip,
        tta=recipe.tta if flip != "none" and size > 1 else "none",
    )


def check_shares(batch: int, micro: int, processes: int) -> None:
    """Raises CallError when a batch cannot be shared out evenly, in whole micro-batches."""
    if batch % processes:
        raise CallError(f"batch_size is shared out evenly; {batch} by {processes} processes does not go: change --batch-size")
    if batch // processes % micro:
        raise CallError(f"a process's share of the batch is whole micro-batches; {batch // processes} by {micro} does not go: change --micro-batch")
