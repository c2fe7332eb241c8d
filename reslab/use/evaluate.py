"""How good a classifier is on labelled images, as records, each figure with its n and a 95 % interval.

Intervals of shares, and of F1, which follows from one, are Wilson's; of other figures, percentiles of 500 bootstrap resamples of the images.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from sklearn.metrics import precision_recall_fscore_support, top_k_accuracy_score

from reslab.errors import WorkError
from reslab.interval import share, wilson
from reslab.use.classifier import Classifier, softmax

BINS = 15  # of the reliability diagram and ECE, equal in width (Guo et al. 2017)
RESAMPLES = 500
DRAWS = 200  # of answers as right as their confidence says, whose calibration error is that of chance
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


def outputs(classifier: Classifier, batches: Iterable[tuple[ArrayLike, ArrayLike, ArrayLike]]) -> Outputs:
    """The classifier's logits for (pixels, labels, items), arrays or tensors on the CPU. Raises WorkError when there is none."""
    rows = [(classifier.logits(np.asarray(pixels)), np.asarray(labels), np.asarray(items)) for pixels, labels, items in batches]
    if not rows:
        raise WorkError("images to score must be readable; none of these is: `reslab check` lists them")
    logits, labels, items = (np.concatenate(column) for column in zip(*rows, strict=True))
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
    """The lowest calibrated probability from which on 95 % of these answers, val's, are right; of others rather fewer, as it is the best of many.

    At least one half, whatever the accuracy: below it an answer is likelier wrong than right. 1 where there is none.
    """
    confidence = softmax(out.logits / temperature).max(1)
    order = np.argsort(-confidence, kind="stable")
    confidence, right = confidence[order], (out.logits.argmax(1) == out.labels)[order]
    last = np.append(confidence[1:] < confidence[:-1], True)  # of its equals, which a threshold lets through together
    enough = np.flatnonzero(last & (np.cumsum(right) >= SURE * np.arange(1, len(right) + 1)))
    return max(0.5, float(confidence[enough[-1]])) if len(enough) else 1.0


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
    before, confidence = raw.max(1), calibrated.max(1)
    figures: dict[str, Callable[[Ints], float]] = {
        "loss": lambda rows: float(losses[rows].mean()),
        "ece_before": lambda rows: ece(before[rows], right[rows]),
        "ece": lambda rows: ece(confidence[rows], right[rows]),
    }
    facts |= _bootstrap(figures, n, rng)
    facts |= {
        "ece_by_chance": float(np.mean([ece(confidence, rng.random(n) < confidence) for _ in range(DRAWS)])),
        "temperature": temperature,
        "reliability": {"before": reliability(before, right), "after": reliability(confidence, right)},
        "classes": _per_class(out.labels, predicted, classes),
        "confusion": _confusion(out.labels, predicted, len(classes)),
    }
    return facts


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


def _bootstrap(figures: dict[str, Callable[[Ints], float]], n: int, rng: np.random.Generator) -> dict[str, float]:
    """Figures that cannot be negative, each with the interval of its resamples about it.

    They are moved to have it as their mean: a calibration error adds up what is noise in its bins, of which a resample has more.
    """
    resampled = np.array([[figure(rows) for figure in figures.values()] for rows in (rng.integers(0, n, n) for _ in range(RESAMPLES))])
    facts: dict[str, float] = {}
    for (name, figure), values in zip(figures.items(), resampled.T, strict=True):
        found = figure(np.arange(n))
        low, high = np.maximum(0, np.percentile(values, [2.5, 97.5]) - values.mean() + found)
        facts |= {name: found, f"{name}_low": float(low), f"{name}_high": float(high)}
    return facts


def _per_class(labels: Ints, predicted: Ints, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    every = np.arange(len(classes))
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    called = np.bincount(predicted, minlength=len(classes))
    right = np.bincount(labels[labels == predicted], minlength=len(classes))
    rows = []
    for c, name in enumerate(classes):
        p_low, p_high = wilson(int(right[c]), int(called[c]))
        r_low, r_high = wilson(int(right[c]), int(support[c]))
        f_low, f_high = _f1_interval(int(right[c]), int(support[c] + called[c] - right[c]))
        rows.append(
            {
                "class": name, "n": int(support[c]),
                "precision": float(precision[c]), "precision_low": p_low, "precision_high": p_high,
                "recall": float(recall[c]), "recall_low": r_low, "recall_high": r_high,
                "f1": float(f1[c]), "f1_low": f_low, "f1_high": f_high,
            }
        )  # fmt: skip
    return rows


def _f1_interval(right: int, either: int) -> tuple[float, float]:
    """F1's interval from the images of a class that are called so, and those that are of it or are called so.

    Their ratio J is a share, so Wilson's interval holds for it; F1 = 2J / (1 + J) grows with J, and takes that interval's
    ends to its own (Lam, Gopal & Qian 2023, 2309.14621: the indirect Wilson method).
    """
    low, high = wilson(right, either)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def _confusion(labels: Ints, predicted: Ints, classes: int) -> list[tuple[int, int, int]]:
    """(label, predicted, count) of every pair that occurs: a full matrix would be large for many classes."""
    pairs, counts = np.unique(labels * classes + predicted, return_counts=True)
    return [(*divmod(int(pair), classes), int(count)) for pair, count in zip(pairs, counts, strict=True)]
