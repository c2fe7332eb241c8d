"""The answers and labels that deserve a second look, as records with a picture: worst mistakes, and suspected label errors."""

import base64
import contextlib
import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from reslab.data.batches import Batches
from reslab.data.decode import Pixels, Unreadable
from reslab.use.classifier import Classifier, softmax
from reslab.use.evaluate import Floats, Ints, Outputs
from reslab.use.explain import heat_maps
from reslab.use.overlay import data_uri, fitted, overlay

SHOWN = 24  # of each kind
THUMBNAIL = 96


def mistakes(classifier: Classifier, out: Outputs, batches: Batches) -> list[dict[str, Any]]:
    """The wrong answers, worst first: those given with the most confidence, and these with what spoke for the answer."""
    probabilities = softmax(out.logits / classifier.temperature)
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != out.labels)
    worst = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:SHOWN]
    confused = _most_confused_examples(out, predicted)
    rest = [i for i in dict.fromkeys(confused) if i not in worst]
    pictures = _overlays(classifier, batches, out.items[worst], predicted[worst])
    entries = [{**_shown(out, batches, probabilities, int(i), "worst"), "overlay": picture} for i, picture in zip(worst, pictures, strict=True)]
    return entries + [_shown(out, batches, probabilities, i, "confused") for i in rest]


def label_suspects(out: Outputs, batches: Batches, temperature: float) -> list[dict[str, Any]]:
    """Images whose label is likely wrong: confident learning (Northcutt et al. 2019, 1911.00068, section 3).

    A label is suspected when another class reaches the mean confidence that the images labelled so have in it.
    """
    probabilities = softmax(out.logits / temperature)
    own = probabilities[np.arange(len(out.labels)), out.labels]
    counts = np.bincount(out.labels, minlength=probabilities.shape[1])
    threshold = np.bincount(out.labels, own, minlength=probabilities.shape[1]) / np.maximum(counts, 1)
    threshold[counts == 0] = np.inf
    confident = np.where(probabilities >= threshold, probabilities, -1)
    likely = confident.argmax(1)
    suspects = np.flatnonzero((confident.max(1) > 0) & (likely != out.labels) & (probabilities.argmax(1) == likely))
    margin = probabilities[suspects, likely[suspects]] - own[suspects]
    ranked = suspects[np.argsort(-margin, kind="stable")]
    return [_shown(out, batches, probabilities, int(i), "label") for i in ranked[:SHOWN]]


def _most_confused_examples(out: Outputs, predicted: Ints, pairs: int = 6, each: int = 4) -> list[int]:
    """Images of the most frequent mistakes; of equally frequent ones those that come first in the confusion matrix, as in the report."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i in np.flatnonzero(predicted != out.labels):
        groups.setdefault((int(out.labels[i]), int(predicted[i])), []).append(int(i))
    ranked = sorted(groups, key=lambda pair: (-len(groups[pair]), pair))[:pairs]
    return [i for pair in ranked for i in groups[pair][:each]]


def _shown(out: Outputs, batches: Batches, probabilities: Floats, row: int, why: str) -> dict[str, Any]:
    item, images = int(out.items[row]), batches.images
    predicted = int(probabilities[row].argmax())
    try:
        picture = thumbnail(images.pixels(item, min(THUMBNAIL, batches.size)))
    except Unreadable:
        picture = ""
    return {
        "why": why,
        "name": images.names[item],
        "label": images.classes[out.labels[row]],
        "predicted": images.classes[predicted],
        "probability": float(probabilities[row, predicted]),
        "label_probability": float(probabilities[row, out.labels[row]]),
        "image": picture,
    }


def _overlays(classifier: Classifier, batches: Batches, items: Ints, labels: Ints) -> list[str]:
    """The Grad-CAM of each item's class over its thumbnail, as a data URI; empty where the image cannot be read any more."""
    readable: dict[int, Pixels] = {}
    for position, item in enumerate(items):
        with contextlib.suppress(Unreadable):
            readable[position] = batches.images.pixels(int(item), batches.size)
    pictures = [""] * len(items)
    if readable:
        pixels = torch.from_numpy(np.stack(list(readable.values())))
        heats = heat_maps(classifier, pixels, torch.from_numpy(labels[list(readable)]))
        for (position, seen), heat in zip(readable.items(), heats, strict=True):
            picture = fitted(Image.fromarray(seen.repeat(3 // seen.shape[2], axis=2)), THUMBNAIL)
            pictures[position] = data_uri(overlay(picture, heat, classifier.preprocess))
    return pictures


def thumbnail(pixels: Pixels) -> str:
    """uint8 (H, W, C) -> a data URI: PNG for tiny images, whose every pixel counts, JPEG for others."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    kind = "PNG" if image.width <= 32 else "JPEG"
    held = io.BytesIO()
    image.save(held, kind, quality=80)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"
