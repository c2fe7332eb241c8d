"""A classifier as a file for other programs, checked on the user's own images before it is called done.

A file is written into a temporary folder, run there, and compared with the net it came from. Only what agrees is moved
to its place, and beside it, in NAME.json, what was found.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reslab.data.decode import Pixels
from reslab.data.images import Images, Indices, read_batches
from reslab.data.source import Progress, silent
from reslab.errors import CallError, WorkError, shown, unknown
from reslab.interval import share
from reslab.run import Run, located, workplace
from reslab.use import quantize
from reslab.use.classifier import BATCH, Classifier, load, softmax
from reslab.use.formats import FORMATS, Format, Runner
from reslab.use.own import own_images

TOLERANCE = 1e-4  # in probabilities, and in logits as a part of the largest
RANDOM_IMAGES = 256

Labelled = tuple[Pixels, Indices | None]  # uint8 (N, canvas, canvas, C), and their labels where they have some


class Exported(NamedTuple):
    """Where the file is, and what was found: bytes, parity, and for int8 and bf16 the verdict."""

    path: Path
    facts: dict[str, Any]


class Sample(NamedTuple):
    """Images to compare on, a batch at a time, and what they are."""

    batches: Callable[[], Iterable[Labelled]]
    kind: str
    why: str = ""  # random ones had to do


def export(
    run: str | Path, to: str, out: str | Path | None = None, *, precision: str = "fp32", max_drop: float = quantize.MAX_DROP,
    reading: Progress = silent, say: Callable[[str], None] = lambda text: None,
) -> Exported:  # fmt: skip
    """Writes the classifier of a run as `to`, one of FORMATS, by default to RUN/export/model.SUFFIX; of a shipped net only to `out`.

    `precision` int8 (ONNX, OpenVINO) or bf16 (ONNX) is refused when slower than fp32 or more than `max_drop` points worse on val.
    Raises CallError for a wrong call and WorkError for a file that does not hold what it must, which is not left behind.
    """
    form = _checked_form(to, precision)
    if not 0 <= max_drop <= 100:
        raise CallError(f"--max-drop must be from 0 to 100 points; received {max_drop}")
    path = Path(run)
    if out is None and Run(located(path)).is_shipped:
        raise CallError(f"an export goes below its run, and {shown(path)} came with reslab, where nothing is written: say where with --out")
    classifier = load(path)
    _ = classifier.net  # an exported file is no source
    target = Path(out) if out else path / "export" / f"model{'' if precision == 'fp32' else '.' + precision}{form.suffix}"
    if target.suffix != form.suffix or target.is_dir():
        raise CallError(f"--out must be a file whose name ends in {form.suffix}; received {shown(target)}")
    images, why = find_images(path, classifier, reading)
    sample = _sample(classifier, images, why)
    if why:
        say(f"compared on random images, without accuracy: {why}")
    with workplace(target) as folder:
        made = folder / f"model{form.suffix}"
        form.write(classifier, made)
        parity = "parity" if precision == "fp32" else "fp32_parity"  # of the graph that is converted
        facts: dict[str, Any] = {"format": to, "precision": precision, parity: check(classifier, form.open(made), sample)}
        if precision != "fp32":
            if images is None:
                raise WorkError(f"{precision} is judged on the run's own images; they are not at hand: {why}")
            facts |= quantize.convert(classifier, images, made, form, precision, max_drop, say)
        facts["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        made.with_name(made.name + ".json").write_text(json.dumps(facts, indent=1), "utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file == made):  # what was asked for comes last
            file.replace(target.with_name(target.stem + file.name.removeprefix("model")))
    return Exported(target, facts)


def in_words(exported: Exported) -> list[str]:
    """What was exported and found, in lines for a person; the last is where it is."""
    facts = exported.facts
    parity = facts.get("parity") or facts["fp32_parity"]
    of = "" if "parity" in facts else " of the fp32 graph"
    lines = [
        f"parity{of} on {parity['n']:,} {parity['images']} images: largest difference {parity['max_difference']:.1e} in probability, "
        f"{parity['max_logit_difference']:.1e} in logits (limit {parity['tolerance']:g}); top-1 agrees on {parity['agreement']:.2%}"
    ]
    if "top1" in facts.get("parity", {}):
        lines.append(f"val top-1 {parity['top1']:.2%} (95 % interval {parity['top1_low']:.2%} to {parity['top1_high']:.2%})")
    if "verdict" in facts:
        lines.append(f"fp32 -> {facts['precision']}: {quantize.in_words(facts['verdict'])}")
    return [*lines, f"{facts['bytes']:,} bytes: {shown(exported.path)}"]


def check(classifier: Classifier, answer: Runner, sample: Sample) -> dict[str, Any]:
    """How far the answers of an exported file are from the classifier's. Raises WorkError when they are too far."""
    found = compare(classifier, answer, sample)
    if max(found["max_difference"], found["max_logit_difference"]) > TOLERANCE:
        raise WorkError(
            f"an exported file must answer within {TOLERANCE:g} of its net; on {found['n']} {found['images']} images this one differs by "
            f"{found['max_difference']:.2g} in probability and {found['max_logit_difference']:.2g} in logits (top-1 agrees on "
            f"{found['agreement']:.2%}): it is not kept"
        )
    return found


def compare(classifier: Classifier, answer: Runner, sample: Sample) -> dict[str, Any]:
    """Largest differences, agreement and both accuracies over the images of a sample; fractions are 0 to 1."""
    n = agree = right = right_before = labelled = 0
    probability = logit = largest = 0.0
    for pixels, labels in sample.batches():
        want = classifier.logits(pixels)
        got_probabilities, got = answer(pixels)
        probability = max(probability, _furthest(got_probabilities, softmax(want / np.float32(classifier.temperature))))
        logit, largest = max(logit, _furthest(got, want)), max(largest, float(np.abs(want).max()))
        n, agree = n + len(pixels), agree + int((got.argmax(1) == want.argmax(1)).sum())
        if labels is not None:
            labelled += len(labels)
            right, right_before = right + int((got.argmax(1) == labels).sum()), right_before + int((want.argmax(1) == labels).sum())
    facts = {
        "images": sample.kind, **({"why": sample.why} if sample.why else {}), "n": n, "tolerance": TOLERANCE,
        "max_difference": probability, "max_logit_difference": logit / max(1.0, largest), "agreement": agree / n,
    }  # fmt: skip
    return {**facts, **share("top1", right, labelled), **share("top1_net", right_before, labelled)} if labelled else facts


def _furthest(got: Any, want: Any) -> float:
    """The largest absolute difference; infinite where shapes differ or a value is no number."""
    if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    return float(np.abs(got.astype(np.float64) - want).max())


def find_images(path: Path, classifier: Classifier, reading: Progress) -> tuple[Images | None, str]:
    """The run's own images, split as for its training, or why there are none."""
    if not (located(path) / "run.toml").is_file():
        return None, f"{shown(path)} has no run.toml that names its data"
    try:
        return own_images(Run.open(path), reading), ""
    except (CallError, WorkError) as error:
        return None, str(error)


def _sample(classifier: Classifier, images: Images | None, why: str) -> Sample:
    frame = classifier.preprocess
    if images is not None:
        own, val = images, images.split["val"]
        return Sample(lambda: ((pixels, labels) for pixels, labels, _ in read_batches(own, val, frame.canvas, BATCH)), "val")

    def random() -> Iterator[Labelled]:
        rng = np.random.default_rng(0)
        for _ in range(0, RANDOM_IMAGES, BATCH):
            yield rng.integers(0, 256, (BATCH, frame.canvas, frame.canvas, frame.channels), dtype=np.uint8), None

    return Sample(random, "random", why)


def _checked_form(to: str, precision: str) -> Format:
    if to not in FORMATS:
        raise unknown("export format", to, FORMATS)
    able = [name for name, form in FORMATS.items() if precision in form.precisions]
    if precision != "fp32" and to not in able:
        raise CallError(f"--{precision} is for --to {' or '.join(able)}; received --to {to}: leave one of them out")
    return FORMATS[to]
