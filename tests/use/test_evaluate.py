"""Figures against scikit-learn, scipy and cases whose answer is known."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score

from reslab.interval import wilson
from reslab.use.evaluate import Outputs, _per_class, ece, fit_temperature, reliability, score, softmax, sure_above

CLASSES = tuple("abcdefg")


@pytest.fixture
def out() -> Outputs:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 400)
    logits = rng.normal(size=(400, 7)) * 2
    logits[np.arange(400), labels] += 3
    return Outputs(logits, labels, np.arange(400))


def _answers(labels: list[int], predicted: list[int], classes: int = 3) -> Outputs:
    return Outputs(np.eye(classes)[predicted] * 4, np.array(labels), np.arange(len(labels)))


def test_figures_equal_those_of_scikit_learn(out: Outputs) -> None:
    facts = score(out, CLASSES, temperature=1.0)
    predicted = out.logits.argmax(1)
    assert facts["top1"] == accuracy_score(out.labels, predicted)
    assert facts["loss"] == pytest.approx(log_loss(out.labels, softmax(out.logits)))
    for name, figure in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert [row[name] for row in facts["classes"]] == pytest.approx(figure(out.labels, predicted, average=None))
    for c, row in enumerate(facts["classes"]):
        right = int(((out.labels == c) & (predicted == c)).sum())
        assert (row["precision_low"], row["precision_high"]) == wilson(right, int((predicted == c).sum()))
        assert (row["recall_low"], row["recall_high"]) == wilson(right, int((out.labels == c).sum()))
    assert sum(count for _, _, count in facts["confusion"]) == facts["n"] == 400
    top5 = np.mean([label in row for label, row in zip(out.labels, np.argsort(-out.logits, 1)[:, :5], strict=True)])
    assert facts["top5"] == pytest.approx(top5)
    for name in ("top1", "top5", "loss", "ece", "ece_before"):
        assert facts[f"{name}_low"] <= facts[name] <= facts[f"{name}_high"]


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (355, 360), (1, 3), (5000, 10_000)])
def test_wilson_equals_scipys(successes: int, n: int) -> None:
    want = binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((want.low, want.high), abs=1e-9)


@pytest.mark.parametrize("n", [3, 50])
def test_the_interval_of_f1_does_not_vanish_where_a_class_is_perfect(n: int) -> None:
    rows = score(_answers(labels=[0] * n + [1] * n, predicted=[0] * n + [1] * n), ("a", "b", "c"), temperature=1.0)["classes"]
    low = wilson(n, n)[0]
    assert (rows[0]["f1_low"], rows[0]["f1_high"]) == pytest.approx((2 * low / (1 + low), 1))
    assert rows[0]["recall_low"] < rows[0]["f1_low"] < 1, "F1 forgives more than recall"
    assert (rows[2]["f1_low"], rows[2]["f1_high"]) == (0, 1), "of a class that was neither there nor called nothing is known"


def test_the_interval_of_f1_covers_the_true_one_95_times_in_100() -> None:
    """Binary answers, wrong for 20 % of the first class and 10 % of the second: F1 of the first is 2 * 0.8 / (1 + 0.8 + 0.1)."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        labels = rng.integers(0, 2, 120)
        predicted = np.where(rng.random(120) < np.where(labels == 0, 0.2, 0.1), 1 - labels, labels)
        row = _per_class(labels, predicted, ("a", "b"))[0]
        covered += row["f1_low"] <= 1.6 / 1.9 <= row["f1_high"]
    assert 0.92 <= covered / 400 <= 0.98


def test_bootstrap_interval_is_about_that_of_the_normal_approximation(out: Outputs) -> None:
    facts = score(out, CLASSES, temperature=1.0)
    losses = -np.log(softmax(out.logits)[np.arange(400), out.labels])
    half = 1.96 * losses.std() / 20
    assert facts["loss_high"] - facts["loss_low"] == pytest.approx(2 * half, rel=0.2)


def test_calibration_error_of_known_cases() -> None:
    right = np.array([True] * 8 + [False] * 2)
    assert ece(np.full(10, 0.8), right) == pytest.approx(0)
    assert ece(np.full(10, 1.0), right) == pytest.approx(0.2)
    assert ece(np.array([1.0] * 8 + [0.0] * 2), right) == pytest.approx(0)
    assert reliability(np.array([0.8] * 6 + [0.81] * 2 + [0.99] * 2), right) == [
        {"bin": 12, "n": 8, "confidence": pytest.approx(0.8025), "top1": 1.0},
        {"bin": 14, "n": 2, "confidence": pytest.approx(0.99), "top1": 0.0},
    ]


def test_calibration_error_by_chance_is_that_of_a_net_whose_confidence_is_right() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (400, 3))
    labels = np.array([rng.choice(3, p=p) for p in softmax(logits)])
    found = score(Outputs(logits, labels, np.arange(400)), ("a", "b", "c"), 1.0)
    draws = [np.array([rng.choice(3, p=p) for p in softmax(logits)]) == logits.argmax(1) for _ in range(40)]
    assert found["ece_by_chance"] == pytest.approx(np.mean([ece(softmax(logits).max(1), right) for right in draws]), rel=0.15)
    few = score(Outputs(logits[:40], labels[:40], np.arange(40)), ("a", "b", "c"), 1.0)
    assert few["ece_by_chance"] > 2 * found["ece_by_chance"]


def test_temperature_undoes_a_known_scaling() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(20_000, 5)) * 1.5
    labels = np.array([rng.choice(5, p=p) for p in softmax(logits)])
    for factor in (0.5, 1.0, 3.0):
        assert fit_temperature(Outputs(logits * factor, labels, labels)) == pytest.approx(factor, rel=0.05)


def test_without_mistakes_confidence_is_not_raised() -> None:
    labels = np.arange(50) % 5
    assert fit_temperature(Outputs(np.eye(5)[labels] * 4, labels, labels)) == pytest.approx(1.0, abs=0.01)


def test_answers_above_the_sure_threshold_are_right_95_times_in_100(out: Outputs) -> None:
    threshold = sure_above(out, temperature=1.0)
    confidence, right = softmax(out.logits).max(1), out.logits.argmax(1) == out.labels
    assert right[confidence >= threshold].mean() >= 0.95
    below = np.sort(confidence[confidence < threshold])[::-1]
    assert all(right[confidence >= lower].mean() < 0.95 for lower in below), "no lower threshold would do"


def test_equal_confidences_are_sure_together_or_not_at_all() -> None:
    labels = np.repeat([0, 1], [60, 40])  # sorted, so that the first of them are all right
    same = Outputs(np.tile([0.6, 0.2], (100, 1)), labels, np.arange(100))
    confidence = softmax(same.logits).max(1)
    assert not (confidence >= sure_above(same, temperature=1.0)).any(), "60 % of them are right"
    rarely = same._replace(labels=np.repeat([0, 1], [96, 4]))
    assert (confidence >= sure_above(rarely, temperature=1.0)).all(), "96 % of them are right"
    above = Outputs(np.concatenate([np.tile([9.0, 0.0], (19, 1)), same.logits]), np.concatenate([np.zeros(19, int), labels]), np.arange(119))
    assert sure_above(above, temperature=1.0) == softmax(above.logits).max(1)[0]


def test_sure_is_never_below_one_half_and_nothing_is_sure_when_nothing_is_right(out: Outputs) -> None:
    perfect = Outputs(out.logits, out.logits.argmax(1), out.items)
    assert sure_above(perfect, temperature=50.0) == 0.5
    wrong = Outputs(out.logits, out.logits.argmin(1), out.items)
    assert sure_above(wrong, temperature=1.0) == 1.0
