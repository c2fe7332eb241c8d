from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reslab.data.images import SPLITS, Images
from reslab.data.source import open_images
from reslab.data.split import split, split_record
from reslab.errors import WorkError
from tests.conftest import draw


def listed(labels: list[int], digests: list[str], declared: list[str] | None = None) -> Images:
    n = len(labels)
    return Images(
        name="x", classes=tuple("abcdefgh"[: max(labels) + 1]), labels=np.array(labels), names=[str(i) for i in range(n)], digests=digests,
        sizes=np.full((n, 2), 8, np.int32), channels=3, declared=declared or [""] * n,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), min_size=0, max_size=120), st.integers(0, 2**32 - 1))
def test_parts_are_disjoint_complete_and_never_share_an_image(rows: list[tuple[int, int]], seed: int) -> None:
    rows = rows + [(c, 1000 + 10 * c + i) for c in range(3) for i in range(6)]  # every class large enough
    images = split(listed([c for c, _ in rows], [str(d) for _, d in rows]), seed)
    parts = [set(images.split[name].tolist()) for name in ("train", "val", "test")]
    assert sorted(i for part in parts for i in part) == list(range(len(rows)))
    held = [{images.digests[i] for i in part} for part in parts]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])


def test_split_is_stratified_and_seeded() -> None:
    digits = open_images("digits")
    first, again, other = split(digits, 0), split(digits, 0), split(digits, 1)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert {name: len(items) for name, items in first.split.items()} == {"train": 1259, "val": 179, "test": 359}
    shares = np.bincount(digits.labels[first.split["test"]]) / np.bincount(digits.labels)
    assert np.abs(shares - 0.2).max() < 0.01


def test_declared_test_is_kept_and_only_val_is_made() -> None:
    labels = [0, 1] * 30
    images = split(listed(labels, [str(i) for i in range(60)], ["test" if i >= 40 else "train" for i in range(60)]), 3)
    assert images.split["test"].tolist() == list(range(40, 60))
    assert len(images.split["val"]) == 4
    assert split_record(images, 3)["made_here"] == ["val"]


def test_share_of_val_is_of_all_images_but_a_declared_test() -> None:
    labels, digests = [0, 1] * 150, [str(i) for i in range(300)]
    for declared, held in (([""] * 300, 30), (["train"] * 200 + ["test"] * 100, 20)):
        assert len(split(listed(labels, digests, declared), 3, val=0.1).split["val"]) == held


def test_share_of_val_that_is_asked_for_has_no_upper_limit() -> None:
    labels, digests = [0, 1] * 20_000, [str(i) for i in range(40_000)]
    assert [len(split(listed(labels, digests), 0, val).split["val"]) for val in (None, 0.1, 0.01)] == [2500, 4000, 400]


def test_record_names_every_image_by_content() -> None:
    images = split(listed([0, 1] * 20, [f"h{i}" for i in range(40)]), 0)
    record = split_record(images, 0)
    assert sorted(row[0] for part in ("train", "val", "test") for row in record[part]) == sorted(images.digests)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0] * 9, "two classes or more; received only 'a'"),
        ([0] * 9 + [1], "class 'b' has 1: add images"),
        ([0] * 9 + [1, 1], "class 'b' has 2"),
    ],
)
def test_classes_too_small_to_split_are_named(labels: list[int], message: str) -> None:
    with pytest.raises(WorkError, match=message):
        split(listed(labels, [str(i) for i in range(len(labels))]), 0)


def test_pixels_classes_and_split_change_the_fingerprint_and_a_name_does_not(folder: Path) -> None:
    before = split(open_images(folder), 0)
    draw(folder / "red" / "3.png", (1, 2, 3), 4242)
    images = split(open_images(folder), 0)
    assert images.fingerprint() != before.fingerprint()
    assert replace(images, name="other", names=[f"other/{name}" for name in images.names]).fingerprint() == images.fingerprint()
    assert replace(images, labels=(images.labels + 1) % 3).fingerprint() != images.fingerprint()
    assert replace(images, split={**images.split, "val": images.split["test"], "test": images.split["val"]}).fingerprint() != images.fingerprint()
    assert replace(images, classes=("blue", "green", "pink")).fingerprint() != images.fingerprint()


@pytest.mark.parametrize(("side", "size"), [(50, 50), (64, 64), (65, 64), (95, 64), (96, 96), (100, 96), (250, 224), (500, 224)])
def test_images_train_at_their_median_short_side_in_steps_of_32_above_64(side: int, size: int) -> None:
    sizes = np.array([(side, 2 * side), (side + 400, side), (side, side), (8, 8), (4000, 3000)], np.int32)
    assert replace(listed([0, 1, 0, 1, 0], list("abcde")), sizes=sizes).image_size == size


def test_copies_of_one_image_are_no_class_that_can_be_split() -> None:
    with pytest.raises(WorkError, match=r"3 images or more that differ.*'b' has 1"):
        split(listed([0] * 6 + [1] * 5, [*map(str, range(6)), *["same"] * 5]), 0)


@pytest.mark.parametrize("seed", range(8))
def test_a_class_of_three_is_in_every_part_whatever_its_copies(seed: int) -> None:
    images = split(listed([0] * 6 + [1] * 11, [*map(str, range(6)), "x", "y", *["z"] * 9]), seed)
    assert all(1 in images.labels[images.split[name]] for name in ("train", "val", "test"))


def test_a_rare_class_is_in_every_part() -> None:
    images = split(listed([0] * 200 + [1] * 3, [str(i) for i in range(203)]), 0)
    assert all(1 in images.labels[images.split[name]] for name in SPLITS)


def test_copies_count_as_images_in_the_share_of_a_part() -> None:
    images = split(listed(np.repeat([0, 1], 200).tolist(), [str(i // 10) for i in range(400)]), 0)
    assert len(images.split["test"]) == 80


def test_copies_that_contradict_each_other_count_in_the_class_of_the_first() -> None:
    with pytest.raises(WorkError, match="'b' has 2"):
        split(listed([0] * 6 + [1] * 3, [*map(str, range(6)), "0", "7", "8"]), 0)
    for seed in range(8):
        images = split(listed([0] * 3 + [1] * 7, ["x", "p", "q", "x", *map(str, range(6))]), seed)
        assert all(0 in images.labels[images.split[name]] for name in SPLITS)
