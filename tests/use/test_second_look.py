"""Which answers get a picture."""

import numpy as np
import pytest

from reslab.data.batches import Batches
from reslab.data.images import Images
from reslab.report.page import PAIRS, _pairs
from reslab.use import second_look
from reslab.use.evaluate import Outputs, score
from reslab.use.second_look import _most_confused_examples, label_suspects, mistakes
from tests.use.conftest import TINY, classifier_of


def test_every_pair_of_classes_in_the_report_has_its_images_where_pairs_are_equally_frequent() -> None:
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 0)][::-1]  # images lie in another order than the confusion matrix
    labels, predicted = (np.repeat(column, 4) for column in zip(*pairs, strict=True))
    out, classes = Outputs(np.eye(4)[predicted], labels, np.arange(28)), list("abcd")
    shown = [{"label": classes[labels[i]], "predicted": classes[predicted[i]]} for i in _most_confused_examples(out, predicted)]
    told = _pairs(score(out, tuple(classes), temperature=1.0), classes, shown)
    assert [len(pair["images"]) for pair in told] == [4] * PAIRS


def given(rows: list[tuple[str, int, int, float]]) -> tuple[Outputs, Batches]:
    """Images (name, label, predicted class, its confidence), of five classes of which the others share the rest."""
    names = [name for name, *_ in rows]
    labels, predicted, confidence = (np.array(column) for column in list(zip(*rows, strict=True))[1:])
    probabilities = np.repeat((1 - confidence)[:, None] / 4, 5, axis=1)
    probabilities[np.arange(len(rows)), predicted] = confidence
    pixels = np.random.default_rng(0).integers(0, 256, (len(rows), 16, 16, 3), dtype=np.uint8)
    sizes, digests = np.full((len(rows), 2), 16, np.int32), [str(i) for i in range(len(rows))]
    images = Images("x", tuple("abcde"), labels, names, digests, sizes, 3, [""] * len(rows), pixels)
    return Outputs(np.log(probabilities), labels, np.arange(len(rows))), Batches(images, np.arange(len(rows)), 16, "memory")


def test_the_worst_mistakes_are_those_with_the_most_confidence_and_the_most_frequent_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_look, "SHOWN", 2)
    rows = [("right", 0, 0, 0.99), ("unsure", 0, 1, 0.4), ("sure", 2, 3, 0.95), ("surer", 4, 1, 0.97), ("again", 0, 1, 0.5), ("right too", 1, 1, 0.3)]
    out, batches = given(rows)
    classifier = classifier_of(TINY, 16)
    found = mistakes(classifier, Outputs(out.logits * classifier.temperature, out.labels, out.items), batches)
    assert [(row["why"], row["name"]) for row in found] == [("worst", "surer"), ("worst", "sure"), ("confused", "unsure"), ("confused", "again")]
    assert [(row["label"], row["predicted"]) for row in found] == [("e", "b"), ("c", "d"), ("a", "b"), ("a", "b")]
    assert [row["probability"] for row in found] == pytest.approx([0.97, 0.95, 0.4, 0.5])
    assert found[0]["label_probability"] == pytest.approx(0.03 / 4)
    assert [row.get("overlay", "")[:15] for row in found] == ["data:image/jpeg", "data:image/jpeg", "", ""]


def test_a_label_is_suspected_where_another_class_is_as_sure_as_it_is_of_its_own_images() -> None:
    """Of b's own images the mean confidence is 0.8, of a's 0.6: the mistake at 0.7 reaches it for a, not for b."""
    own = [(f"{label} {i}", row, row, confidence) for row, label, confidence in ((0, "a", 0.6), (1, "b", 0.8)) for i in range(50)]
    planted = [("some", 1, 0, 0.7), ("little", 0, 1, 0.7), ("most", 0, 1, 0.99), ("more", 0, 1, 0.9)]
    out, batches = given([*own, *planted])
    found = label_suspects(out, batches, temperature=1.0)
    assert [(row["name"], row["label"], row["predicted"]) for row in found] == [("most", "a", "b"), ("more", "a", "b"), ("some", "b", "a")]
    assert {row["why"] for row in found} == {"label"}
    assert label_suspects(*given(own), temperature=1.0) == []
