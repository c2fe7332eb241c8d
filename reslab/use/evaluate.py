"""How good a classifier is on labelled images, as records, each figure with its n and a 95 % interval.

Intervals of counts are Wilson's; of other figures, percentiles of 500 bootstrap resamples of the images.
"""

import base64
import contextlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import minimize_scalar
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score

from reslab.data.batches import Batches
from reslab.data.decode import Pixels, Unreadable
from reslab.interval import share, wilson
from reslab.use.classifier import BATCH, Classifier
from reslab.use.explain import heat_maps
from reslab.use.overlay import data_uri, fitted, overlay

BINS = 15  # of the reliability diagram and ECE, equal in width (Guo et al. 2017)
RESAMPLES = 500
SHOWN = 24  # worst mistakes, and suspected label errors, kept with a thumbnail
THUMBNAIL = 96
TEMPERATURES = (0.25, 100.0)
SURE = 0.95  # the share of right answers that "sure" stands for
FEW_MISTAKES = 10  # that many wrong answers are needed to tell that a net is not confident enough

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Outputs(NamedTuple):
    """Logits (N, classes), labels (N) and positions in the Images (N)."""

    logits: Floats
    labels: Ints
    items: Ints


def outputs(classifier: Classifier, batches: Batches) -> Outputs:
    """The classifier's logits for every image of a part."""
    rows = [(classifier.logits(b.pixels), b.labels, b.items) for b in batches.epoch(BATCH)]
    logits, labels, items = (torch.cat(column).numpy() for column in zip(*rows, strict=True))
    return Outputs(logits.astype(np.float64), labels, items)


def fit_temperature(out: Outputs) -> float:
    """The temperature that makes val likeliest (Guo et al. 2017, section 4.2), within 0.25 to 100.

    With hardly a mistake in val, the likeliest is absolute certainty; then confidence is only ever lowered.
    """
    wrong = (out.logits.argmax(1) != out.labels).sum()
    low, high = (TEMPERATURES[0] if wrong >= FEW_MISTAKES else 1.0), TEMPERATURES[1]
    result = minimize_scalar(lambda t: float(nll(out.logits / np.exp(t), out.labels).mean()), bounds=(np.log(low), np.log(high)), method="bounded")
    return float(np.exp(result.x))


def sure_above(out: Outputs, temperature: float) -> float:
    """The lowest calibrated probability above which 95 % of the answers are right (Geifman & El-Yaniv 2017, 1705.08500).

    At least one half, whatever the accuracy: below it an answer is likelier wrong than right.
    """
    confidence = softmax(out.logits / temperature).max(1)
    order = np.argsort(-confidence, kind="stable")
    right = (out.logits.argmax(1) == out.labels)[order]
    enough = np.flatnonzero(np.cumsum(right) >= SURE * np.arange(1, len(right) + 1))
    return max(0.5, float(confidence[order][enough[-1]])) if len(enough) else 1.0


def score(out: Outputs, classes: tuple[str, ...], temperature: float, seed: int = 0) -> dict[str, Any]:
    """Every figure of one part, ready for a record."""
    n = len(out.labels)
    predicted = out.logits.argmax(1)
    right = predicted == out.labels
    raw, calibrated = softmax(out.logits), softmax(out.logits / temperature)
    losses = nll(out.logits / temperature, out.labels)
    facts: dict[str, Any] = {"n": n, **share("top1", int(right.sum()), n)}
    if len(classes) > 5:
        top5 = top_k_accuracy_score(out.labels, out.logits, k=5, normalize=False, labels=np.arange(len(classes)))
        facts |= share("top5", int(top5), n)
    rng = np.random.default_rng(seed)
    resamples = rng.integers(0, n, (RESAMPLES, n))
    facts |= _bootstrap("loss", resamples, lambda rows: float(losses[rows].mean()))
    for name, probabilities in (("ece_before", raw), ("ece", calibrated)):
        confidence = probabilities.max(1)
        facts |= _bootstrap(name, resamples, lambda rows, c=confidence: ece(c[rows], right[rows]))  # type: ignore[misc]
    facts |= {
        "temperature": temperature,
        "reliability": {"before": reliability(raw.max(1), right), "after": reliability(calibrated.max(1), right)},
        "classes": _per_class(out.labels, predicted, classes, resamples[:200]),
        "confusion": _confusion(out.labels, predicted, len(classes)),
    }
    return facts


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


def softmax(logits: Floats) -> Floats:
    """Rows of probabilities."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    probabilities: Floats = e / e.sum(1, keepdims=True)
    return probabilities


def nll(logits: Floats, labels: Ints) -> Floats:
    """The negative log-likelihood of each label, in nats."""
    top = logits.max(1)
    losses: Floats = top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(len(labels)), labels]
    return losses


def reliability(confidence: Floats, right: NDArray[np.bool_]) -> list[dict[str, float]]:
    """Each bin that holds an image: how many, their mean confidence, the share that is right."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    rows = []
    for b in np.unique(bins):
        inside = bins == b
        rows.append({"bin": int(b), "n": int(inside.sum()), "confidence": float(confidence[inside].mean()), "top1": float(right[inside].mean())})
    return rows


def ece(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over 15 equal bins (Guo et al. 2017, eq. 3)."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, confidence, BINS) - np.bincount(bins, right, BINS)
    return float(np.abs(gaps).sum() / len(right))


def _bootstrap(name: str, resamples: Ints, figure: Callable[[Ints], float]) -> dict[str, float]:
    values = [figure(rows) for rows in resamples]
    low, high = np.percentile(values, [2.5, 97.5])
    return {name: figure(np.arange(resamples.shape[1])), f"{name}_low": float(low), f"{name}_high": float(high)}


def _per_class(labels: Ints, predicted: Ints, classes: tuple[str, ...], resamples: Ints) -> list[dict[str, Any]]:
    every = np.arange(len(classes))
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    called = np.bincount(predicted, minlength=len(classes))
    right = np.bincount(labels[labels == predicted], minlength=len(classes))
    spread = np.percentile([_f1(labels[rows], predicted[rows], len(classes)) for rows in resamples], [2.5, 97.5], axis=0)
    rows = []
    for c, name in enumerate(classes):
        p_low, p_high = wilson(int(right[c]), int(called[c]))
        r_low, r_high = wilson(int(right[c]), int(support[c]))
        rows.append(
            {
                "class": name, "n": int(support[c]),
                "precision": float(precision[c]), "precision_low": p_low, "precision_high": p_high,
                "recall": float(recall[c]), "recall_low": r_low, "recall_high": r_high,
                "f1": float(f1[c]), "f1_low": float(spread[0, c]), "f1_high": float(spread[1, c]),
            }
        )  # fmt: skip
    return rows


def _f1(labels: Ints, predicted: Ints, classes: int) -> Floats:
    right = np.bincount(labels[labels == predicted], minlength=classes)
    both = np.bincount(labels, minlength=classes) + np.bincount(predicted, minlength=classes)
    scores: Floats = 2 * right / np.maximum(both, 1)
    return scores


def _confusion(labels: Ints, predicted: Ints, classes: int) -> list[tuple[int, int, int]]:
    """(label, predicted, count) of every pair that occurs: a full matrix would be large for many classes."""
    matrix = confusion_matrix(labels, predicted, labels=np.arange(classes))
    return [(int(i), int(j), int(matrix[i, j])) for i, j in zip(*np.nonzero(matrix), strict=True)]


def _most_confused_examples(out: Outputs, predicted: Ints, pairs: int = 6, each: int = 4) -> list[int]:
    counts: dict[tuple[int, int], list[int]] = {}
    for i in np.flatnonzero(predicted != out.labels):
        counts.setdefault((int(out.labels[i]), int(predicted[i])), []).append(int(i))
    ranked = sorted(counts.values(), key=len, reverse=True)[:pairs]
    return [i for group in ranked for i in group[:each]]


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
