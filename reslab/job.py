"""The main job, end to end: data, check, split, plan, training, artefact, test, report."""

import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from reslab.data.augment import require_kornia
from reslab.data.batches import Batches, choose_storage, drawn, mean_and_std, mean_image, sample
from reslab.data.check import cheap_check
from reslab.data.images import SPLITS, Images, read_batches
from reslab.data.preprocess import VIEWS, Preprocess
from reslab.data.source import open_images
from reslab.data.split import split, split_record
from reslab.describe import Job, run_config, sentence
from reslab.errors import CallError, WorkError, shown
from reslab.family import name_of
from reslab.family import spec as find_spec
from reslab.limits import Limits, bytes_of, seconds
from reslab.nets.initialise import begin_as_identity, whiten
from reslab.nets.torch import ResNet
from reslab.nets.weights import load_weights, stem_of
from reslab.report.page import write_report
from reslab.resume import check_same, check_unfinished, left_behind, sign
from reslab.run import Run, write_whole
from reslab.spec import STEMS, Spec
from reslab.train.board import Board, require_tensorboard
from reslab.train.checkpoint import choose_segments
from reslab.train.fit import Show, Training
from reslab.train.hardware import Machine, machine
from reslab.train.plan import Plan, fit_budget, make_plan
from reslab.train.recipe import Recipe, find_recipe, made_for, resolve
from reslab.train.recipe import from_dict as recipe_from_dict
from reslab.use.artefact import TorchModel, save
from reslab.use.classifier import BATCH, Classifier
from reslab.use.evaluate import fit_temperature, outputs, score, sure_above
from reslab.use.inference import CALIBRATED, WEIGHED, WEIGHED_BATCH, told, weighing_seconds
from reslab.use.own import changed, reordered
from reslab.use.second_look import label_suspects, mistakes

T = TypeVar("T")
REPORT_SECONDS = 10.0  # kept back from a budget for the report and what surrounds it
PATCHED = 500  # images whose patches are whitened
SMALL = 64  # pixels a side up to which a CIFAR net is the default
KERNELS = {(3,): "conv3", (7,): "conv7-pool", (3, 3, 3): "deep-pool"}  # of a stem in a weights file: its row in STEMS
EVAL_MARGIN = 256 / 224  # photos are tested on the middle 224 of 256 pixels


class JobShow(Show, Protocol):
    """A Show that is also told how far reading and downloading are."""

    def reading(self, what: str, done: int, total: int) -> None: ...


class Silent:
    """A JobShow that shows nothing."""

    def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None: ...

    def epoch(self, epoch: int, epochs: int, facts: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...

    def reading(self, what: str, done: int, total: int) -> None: ...


def train(
    data: str | Path | None = None, net: str | Spec | None = None, out: str | Path | None = None, *, resume: str | Path | None = None,
    recipe: str | Recipe = "quick", budget: str | float | None = None, memory: str | int | None = None, tensorboard: bool = False,
    show: JobShow | None = None, **fields: Any,
) -> Run:  # fmt: skip
    """Trains a classifier on a folder, a CSV or a named data set, tests it once, and writes a run folder with a report.

    `net` is a name in FAMILY or a Spec; by default the recipe's own, or resnet20 for images up to 64 px and resnet18 above.
    `budget` is a time such as "20m", or seconds. `memory` is what the process may hold (on a GPU, tensors there), such as "4G", or bytes: as
    many blocks as that takes are computed twice, which changes no result. Any Recipe field can be given by name. `resume`
    continues the run in that folder; `tensorboard` also writes the curves to RUN/tensorboard. Processes that torchrun
    starts again after one was lost continue their run from its last state.
    Raises CallError for a wrong call, WorkError when the work fails, Interrupted after Ctrl-C, SIGTERM or SIGHUP.
    """
    show = show or Silent()
    if tensorboard:
        require_tensorboard()
    started = time.monotonic()
    with machine() as here, ExitStack() as held:
        if not here.is_writer:
            show = Silent()
        limits = Limits(seconds(budget), bytes_of(memory))
        for name in ("epochs", "steps"):
            if limits.seconds and fields.get(name) is not None:
                raise CallError(f"a budget decides how long a training is; received --budget {shown(str(budget))} and --{name} {fields[name]}: leave one out")
        run = Run.open(resume) if resume else left_behind(out, data or "digits", net, here) if here.restarts else None
        if resume and run:
            check_same(run, data, net, out, recipe, fields)
        if run:
            check_unfinished(run)
            held.enter_context(run.alone() if here.is_writer else nullcontext())
            training, job = _resume(run, limits, here, show, started)
        else:
            training, job = _start(data or "digits", net or made_for(recipe), out, find_recipe(recipe, **fields), limits, here, show, started)
            held.enter_context(training.run.alone() if here.is_writer else nullcontext())
        if tensorboard and here.is_writer:
            training.board = Board(training.run.path / "tensorboard")
        return _finish(job, training, show)


def _start(
    data: str | Path, net: str | Spec | None, out: str | Path | None, recipe: Recipe, limits: Limits, here: Machine, show: JobShow, started: float
) -> tuple[Training, Job]:  # fmt: skip
    if isinstance(net, str):
        find_spec(net)  # a wrong name is said before any data is read
    _check_options(recipe, limits, here)
    Run.check_free(Path(out) if out else _free_folder(data))
    images = _in_turn(here, lambda: open_images(data, show.reading))
    finding = cheap_check(images)
    for line in finding:
        show.say(line)
    if recipe.balance == "sampling" and "://" in images.source:
        raise CallError("shards from elsewhere are read in their order; received --balance sampling, which draws images anywhere: use --balance weights")
    images = split(images, recipe.seed, recipe.val)
    _check_alike(images, here)
    net = net or ("resnet20" if (recipe.image_size or images.image_size) <= SMALL else "resnet18")
    if recipe.weights:
        spec, size = _spec_of_weights(net, recipe, images)
        images = replace(images, channels=spec.in_channels)
    else:
        size = recipe.image_size or images.image_size
        spec = find_spec(net).fit(size, images.channels, len(images.classes))
    if spec.flatten:
        if recipe.low_resolution:
            raise CallError(f"a net that flattens its map has one image size; received --low-resolution {recipe.low_resolution}: leave it out")
        recipe = replace(recipe, low_resolution=0.0)
    recipe = resolve(recipe, len(images.split["train"]), size, images.upright, here.world)
    if recipe.zero_init is not None:
        spec = find_spec(spec, zero_init=recipe.zero_init)
    job = _prepare(images, spec, recipe, here, show)
    torch.manual_seed(recipe.seed)
    built = here.place(ResNet(spec))
    if recipe.weights:
        show.say(f"weights: {load_weights(built, recipe.weights)}")
    if recipe.whiten:
        _whiten(built, job)
    if recipe.dirac:
        begin_as_identity(built)
    plan, deadline = _plan(job, built, limits, started)
    recipe = replace(recipe, precision=plan.precision)  # type: ignore[arg-type]
    if limits.seconds:
        recipe = replace(recipe, epochs=None, steps=None)  # the plan has them
    job.recipe = recipe
    run = Run(out or _claimed(data, here), started)
    if here.is_writer:
        run.create()
        sign(run)
        run.config = run_config(job, name_of(net), str(data), plan, limits)
        write_whole(run.path / "split.json", _json(split_record(images, recipe.seed)))
        run.record("plan", **asdict(plan), budget=limits.seconds)
        for line in finding:
            run.record("warning", text=line)
    show.say(sentence(job, name_of(net), plan))
    here.agree(0)  # nobody trains before the folder exists
    training = Training(built, job.parts["train"], job.parts["val"], job.preprocess, recipe, plan, run, here, show, deadline)
    return training, job


def _check_alike(images: Images, here: Machine) -> None:
    """Raises WorkError where this process has other images than the writer, or in another order: each takes its share by position."""
    if here.world > 1:
        order = hashlib.sha256("".join(images.digests[i] for part in SPLITS for i in images.split[part]).encode())
        mine = (images.fingerprint(), images.classes, order.hexdigest())
        if here.agree(mine) != mine:
            raise WorkError(
                f"all processes must see the same images; {shown(images.source)} on {platform.node()} has others than the first one's: copy it again"
            )


def _check_options(recipe: Recipe, limits: Limits, here: Machine) -> None:
    """Raises CallError for options that do not go together, before any data is read."""
    if recipe.randaugment:
        require_kornia()
    if limits.memory and recipe.compile == "always":
        raise CallError("a net that keeps to a memory is not compiled; received --memory and --compile always: leave one out")
    if recipe.weights:
        _in_turn(here, lambda: stem_of(recipe.weights))
        if recipe.whiten:
            raise CallError("the first convolution is whitened or read from a file; received --whiten and --weights: leave one out")
        if recipe.dirac:
            raise CallError("convolutions begin as the identity or as a file has them; received --dirac and --weights: leave one out")
        if recipe.zero_init is not None:
            raise CallError("branches begin at zero or as a file has them; received --zero-init or --no-zero-init, and --weights: leave one out")
    elif recipe.freeze != "none" or recipe.trunk_lr != 1:
        raise CallError("fine-tuning (--recipe finetune, --freeze, --trunk-lr) starts from weights; received none: give --weights FILE")


def _resume(run: Run, limits: Limits, here: Machine, show: JobShow, started: float) -> tuple[Training, Job]:
    config = run.config
    try:
        spec, held = Spec.from_dict(config["spec"]), config["data"].get("storage", "auto")  # as then, for it decides what is left out and when
        kept = recipe_from_dict({**config["recipe"], "storage": held.partition(":")[0]})
        plan = Plan(**{**config["plan"], "segments": tuple(config["plan"]["segments"])})
        source, fingerprint, classes = config["data"]["source"], config["data"]["fingerprint"], config["data"].get("classes")
    except (KeyError, TypeError, AttributeError, CallError) as error:
        raise WorkError(f"{shown(run.path / 'run.toml')} is damaged: {shown(str(error))}") from error
    try:
        images = split(_in_turn(here, lambda: open_images(source, show.reading)), kept.seed, kept.val)
    except CallError as error:
        raise WorkError(f"a run resumes on the data it began with; {shown(source)} is gone: move it back, or train into a new --out") from error
    if kept.weights:
        images = replace(images, channels=spec.in_channels)
    if what := changed(images, fingerprint, classes) or reordered(images, run):
        raise WorkError(f"a run resumes on the data it began with; {shown(source)} {what}: restore it, or train into a new --out")
    job = _prepare(images, spec, kept, here, show)
    built = here.place(ResNet(spec))
    if limits.memory:
        segments = choose_segments(spec, kept, plan.precision, limits.memory, here)
        plan = replace(plan, memory=limits.memory, segments=segments, compiled=False, replayed=False)  # as `make_plan` has it
    total = limits.seconds or config.get("budget")
    training = Training(built, job.parts["train"], job.parts["val"], job.preprocess, kept, plan, run, here, show)
    training.resume()
    if here.is_writer:
        run.mend()
    run.start = started - training.progress.seconds
    training.deadline = started + total - training.progress.seconds - _reserve(job, plan) if total else None
    show.say(f"resumed {shown(run.path)} at step {training.progress.step} of {training.progress.steps}")
    return training, job


def _prepare(images: Images, spec: Spec, recipe: Recipe, here: Machine, show: JobShow) -> Job:
    size = recipe.image_size
    assert size is not None
    canvas = size if recipe.crop in ("pad", "none") else round(size * EVAL_MARGIN)
    train_canvas = round(size * 480 / 224) if recipe.crop == "scale" else canvas
    storage, why = here.agree(choose_storage(images, train_canvas, here.sharers))  # an unreadable image counts where all are decoded before
    storage = storage if recipe.storage == "auto" else recipe.storage
    parts = {name: Batches(images, images.split[name], train_canvas if name == "train" else canvas, storage, here.decoders) for name in images.split}
    for name in ("train", "val"):
        parts[name].load(lambda done, name=name: show.reading(f"decoding {name}", done, len(images.split[name])))  # type: ignore[misc]
    _check_readable(parts, recipe)
    mean, std = mean_and_std(parts["train"])
    means = torch.tensor(mean)
    if recipe.normalize == "pixel-mean":
        whole = mean_image(parts["train"])
        means = torch.nn.functional.interpolate(whole[None], size, mode="bilinear", antialias=True)[0] if whole.shape[1] != size else whole
        std = [1.0] * images.channels
    preprocess = Preprocess(size, canvas, images.channels, means.numpy(), np.array(std, dtype=np.float32), recipe.tta)
    return Job(images, spec, recipe, preprocess, parts, f"{storage}: {why}", here)


def _in_turn(here: Machine, work: Callable[[], T]) -> T:
    """What `work` gives; of several processes the writer goes first, so that a download happens once."""
    if not here.is_writer:
        here.agree(0)
    done = work()
    if here.is_writer:
        here.agree(0)
    return done


def _spec_of_weights(net: str | Spec, recipe: Recipe, images: Images) -> tuple[Spec, int]:
    """The net as the file has it, its stem and channels kept, and an image size that suits this stem."""
    channels, kernels = stem_of(recipe.weights)
    spec = find_spec(net, in_channels=channels, num_classes=len(images.classes))
    if kernels in KERNELS and kernels != tuple(kernel for _, kernel, _ in STEMS[spec.stem].convs):
        spec = replace(spec, stem=KERNELS[kernels])
    size = recipe.image_size or (images.image_size if images.image_size >= 4 * spec.reduction or spec.stem == "conv3" else 224)
    spec.check_size(size)
    return spec, size


def _check_readable(parts: dict[str, Batches], recipe: Recipe) -> None:
    if 0 < len(parts["train"].items) < (recipe.batch_size or 0):
        raise CallError(f"a batch must not be larger than the training data: batch_size {recipe.batch_size}, {len(parts['train'].items)} readable images")
    for name, part in parts.items():
        if not len(part.items):
            raise WorkError(f"the {name} images must be readable; none of {len(part.dropped)} is: `reslab check` lists them")
    train = parts["train"]
    counts = np.bincount(train.images.labels[train.items], minlength=len(train.images.classes))
    if not counts.all():
        raise WorkError(f"each class needs a readable image to train on; {shown(train.images.classes[counts.argmin()])!r} has none: `reslab check` lists them")


def _whiten(net: ResNet, job: Job) -> None:
    """Sets the first convolution by a sample of the training images; with several processes, DDP hands on the writer's."""
    seen = next(job.parts["train"].epoch(PATCHED, sample(job.parts["train"], PATCHED)))
    whiten(net.first_conv, job.preprocess(seen.pixels, job.machine.device))


def _plan(job: Job, net: ResNet, limits: Limits, started: float) -> tuple[Plan, float | None]:
    recipe = job.recipe
    assert recipe.batch_size is not None
    batch = next(job.parts["train"].epoch(recipe.batch_size // job.machine.world or 1))
    x = job.preprocess(batch.pixels, job.machine.device).contiguous(memory_format=torch.channels_last)
    macs = job.spec.cost(recipe.image_size).macs
    plan = make_plan(net, x, recipe, len(job.parts["train"].items), len(job.parts["val"].items), macs, job.machine, limits.memory, limits.seconds or math.inf)
    plan, deadline = job.machine.agree(plan), None
    if limits.seconds:
        deadline = started + limits.seconds - _reserve(job, plan)
        plan = fit_budget(plan, recipe, job.machine.agree(deadline - time.monotonic()))  # where it does not fit, no process goes on
    return plan, deadline


def _reserve(job: Job, plan: Plan) -> float:
    """Seconds for what follows the training: val and test, choosing the precision that predicts, which takes fp32 too, and the report."""
    val, test = len(job.parts["val"].items), len(job.parts["test"].items)
    alone = plan.val_seconds * job.machine.world  # the plan's val is shared out, what follows is the writer's
    an_image = 2 * VIEWS[job.recipe.tta] * alone / val  # by the net as it is, which takes up to twice as long as the plan's
    return REPORT_SECONDS + an_image * (val + test) + weighing_seconds(val, an_image, job.machine.device)


def _finish(job: Job, training: Training, show: JobShow) -> Run:
    training.run_to_end()
    run = training.run
    if not job.machine.is_writer:
        return run
    net = training.net
    assert isinstance(net, ResNet)
    show.say("testing")
    model = TorchModel(net.eval(), job.preprocess)
    found = Classifier(model, job.images.classes)
    job.parts["test"].load()
    precision = training.plan.precision
    with job.machine.autocast(precision):  # it is tested as it was trained
        val, test = (outputs(found, job.parts[part].epoch(BATCH)) for part in ("val", "test"))
    temperature = fit_temperature(val)
    found = replace(found, temperature=temperature, sure=sure_above(val, temperature))
    seed, classes = job.recipe.seed, job.images.classes
    # The artefact is written last: a run with model/ is a finished run.
    scores = score(val, classes, found.temperature, seed)
    run.record("calibration", split="val", epoch=training.kept_epoch, sure=found.sure, precision=precision, **scores)
    run.record("test", precision=precision, **score(test, classes, found.temperature, seed))
    for entry in mistakes(found, test, job.parts["test"]):
        run.record("mistake", split="test", **entry)
    for part, out in (("val", val), ("test", test)):
        for entry in label_suspects(out, job.parts[part], found.temperature):
            run.record("suspect", split=part, **entry)
    for batches in job.parts.values():
        for name, reason in batches.dropped.items():
            run.record("warning", text=f"left out {shown(name)}: {reason}")
    found = replace(found, model=_weighed(model, job, show))
    save(found, run.model, {"n": len(val.labels), "split": "val", "top1": scores["top1"]})
    run.record("end")
    write_report(run)
    return run


def _weighed(model: TorchModel, job: Job, show: JobShow) -> TorchModel:
    """The model, knowing in which precision it may predict, by images in random order: a folder's lie class by class."""
    val, train, seed = job.parts["val"], job.parts["train"], job.recipe.seed
    held = (batch.pixels.numpy() for batch in val.epoch(WEIGHED_BATCH, drawn(val, WEIGHED[1], seed)))
    seen = read_batches(job.images, train.items[drawn(train, CALIBRATED, seed)], model.preprocess.canvas, WEIGHED_BATCH)
    try:
        model = model.weighed(held, (pixels for pixels, _, _ in seen))
    except WorkError as error:  # images that were there before; the training is not lost for them
        show.say(f"predicts in fp32, for no other precision could be measured: {error}")
    if in_what := told(model.inference):
        show.say(in_what)
    return model


def _free_folder(data: str | Path) -> Path:
    """runs/NAME, or runs/NAME-2 and so on when that is taken."""
    name = re.sub(r"[^\w.-]+", "-", Path(data).expanduser().resolve().stem if Path(data).exists() else str(data)).strip("-.") or "run"
    numbered = [Path("runs") / name, *(Path("runs") / f"{name}-{i}" for i in range(2, 10_000))]
    return next(path for path in numbered if not path.exists())


def _claimed(data: str | Path, here: Machine) -> Path:
    """A free folder, made by the writer: trainings that began at once each get their own."""
    path = _free_folder(data)
    while here.is_writer:
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            path = _free_folder(data)
    return here.agree(path)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
