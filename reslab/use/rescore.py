"""A finished classifier on labelled images again: a run's own test part, or any data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reslab.data.images import Images, read_batches
from reslab.data.source import Progress, open_images, silent
from reslab.errors import CallError, WorkError, shown, unknown
from reslab.run import Run
from reslab.use.classifier import BATCH, Classifier, load
from reslab.use.evaluate import outputs, score
from reslab.use.own import own_images


def evaluate(path: str | Path, data: str | Path | None = None, reading: Progress = silent) -> dict[str, Any]:
    """Scores a finished run on its test part again, or a run or a .onnx file on all images of `data`. A run records it.

    "left_out" counts the images that could not be read; "first_left_out" names one of them, with the reason.
    "not_recorded" says why the run has no record of them, where it could not be written.
    "learned" says how many of the images it was trained on or chosen by, byte for byte: of these the figures say nothing.
    Raises CallError when `data` has a class that the classifier does not know, WorkError when the run's own data has changed.
    """
    is_file = Path(path).suffix.lower() == ".onnx"
    run = None if is_file else Run.open(path)
    classifier = load(path)
    if data is not None:
        images = _labelled(classifier, data, reading)
        items = np.arange(len(images), dtype=np.int64)
    elif run is not None:
        images = own_images(run, reading)
        items = images.split["test"]
    else:
        raise CallError(f"an exported file has no images of its own; received {shown(path)} alone: name the data too")
    left_out = {} if data is None else {problem.name: problem.reason for problem in images.problems}
    batches = read_batches(images, items, classifier.preprocess.canvas, BATCH, left_out)
    scores = score(outputs(classifier, batches), classifier.classes, classifier.temperature)
    scores["left_out"] = len(left_out)
    if left_out:
        scores["first_left_out"] = "{} ({})".format(*map(shown, next(iter(left_out.items()))))
    if run is not None and data is not None:
        learned = _learned(run)
        scores["learned"] = sum(digest in learned for digest in images.digests)
    if run is not None and not run.is_shipped:
        try:
            run.record("evaluation", data=shown(images.source), **scores)
        except WorkError as error:  # of another user, or on a full disk: the scores are what was asked for
            scores["not_recorded"] = str(error)
    return scores


def _learned(run: Run) -> set[str]:
    """The contents of the images in train and val; none of a run without its split.json, as those that come with the package."""
    try:
        held = json.loads((run.path / "split.json").read_text("utf-8"))
        return {digest for part in ("train", "val") for digest, _ in held[part]}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkError(f"{shown(run.path / 'split.json')} cannot be read: {shown(str(error))[:120]}") from error


def _labelled(classifier: Classifier, data: str | Path, reading: Progress) -> Images:
    """Other images, their labels in the order of the classifier's classes."""
    images = open_images(data, reading)
    for name in images.classes:
        if name not in classifier.classes:
            raise unknown("class", name, map(shown, classifier.classes), f" (in {shown(data)})")
    labels = np.array([classifier.classes.index(name) for name in images.classes], dtype=np.int64)[images.labels]
    return replace(images, labels=labels, classes=classifier.classes, channels=classifier.preprocess.channels)
