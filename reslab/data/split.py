"""Which image is for training, which for choosing a model, and which is looked at once, at the end.

A split that the source declares is kept. What is missing is made here: seeded, stratified by class, and grouped, so
that byte-identical images never straddle it. Nothing is copied; `split.json` names every image by content hash.
"""

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np

from reslab.data.images import SPLITS, Images, Indices
from reslab.errors import WorkError, shown

TEST = 0.2
VAL = 0.1
MOST_VAL = 2500  # enough for an interval of +-1.2 points at 90 %; the rest is better spent on training


def split(images: Images, seed: int, val: float | None = None) -> Images:
    """The same images with `split` filled in: sorted indices for train, val and test.

    `val` is the share of the images that a val made here takes; by default a tenth, of which MOST_VAL at most.
    Raises WorkError when a class is too small to be in each part that has to be made.
    """
    parts: dict[str, Indices] = {name: _declared(images, name) for name in SPLITS}
    undeclared = _declared(images, "")
    parts["train"] = np.sort(np.concatenate([parts["train"], undeclared]))
    fixed = {name for name in ("val", "test") if len(parts[name])}
    if reason := too_small_to_split(images):
        raise WorkError(reason)
    rng = np.random.default_rng([seed, 0x5911])
    if "test" not in fixed:
        parts["train"], parts["test"] = _take(images, parts["train"], TEST, None, rng, leave=1 if "val" in fixed else 2)
    if "val" not in fixed:
        share = (val or VAL) / (1 if "test" in fixed else 1 - TEST)
        parts["train"], parts["val"] = _take(images, parts["train"], share, None if val else MOST_VAL, rng)
    return replace(images, split=parts)


def split_record(images: Images, seed: int) -> dict[str, Any]:
    """What `split.json` holds: for each part, [content hash, name] of every image in it."""
    made = [name for name in ("val", "test") if not len(_declared(images, name))]
    return {
        "seed": seed,
        "made_here": made,
        "rule": "stratified by class, byte-identical images together" if made else "as the source gives it",
        **{name: [[images.digests[i], images.names[i]] for i in images.split[name]] for name in SPLITS},
    }


def _declared(images: Images, name: str) -> Indices:
    return np.flatnonzero(np.asarray(images.declared, dtype="U5") == name).astype(np.int64)


def too_small_to_split(images: Images) -> str:
    """Why no split can be made, in the words of an error; empty when one can."""
    if len(images.classes) < 2:
        only = f"only {shown(images.classes[0])!r}" if images.classes else "none"
        return f"a classifier needs two classes or more; received {only}: add a folder or label for each class"
    train = np.sort(np.concatenate([_declared(images, "train"), _declared(images, "")]))
    need = 3 - sum(1 for name in ("val", "test") if len(_declared(images, name)))
    first: dict[str, int] = {}  # copies stay together, in the class of the first
    for i in train:
        first.setdefault(images.digests[i], int(images.labels[i]))
    counts = Counter(first.values())
    for label, name in enumerate(images.classes):
        if counts[label] < need:
            return (
                f"each class needs {need} images or more that differ, to train on (and to hold out for val and test); class "
                f"{shown(name)!r} has {counts[label]}: add images or remove the class"
            )
    return ""


def _take(images: Images, items: Indices, fraction: float, most: int | None, rng: np.random.Generator, leave: int = 1) -> tuple[Indices, Indices]:
    """Splits `items` in (kept, taken). Every class gives its share, at least one image and not the last `leave`, copies counted once."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i in items:
        groups[images.digests[i]].append(int(i))
    by_class: dict[int, list[list[int]]] = defaultdict(list)
    for group in groups.values():  # in order of first appearance, so equal data and seed give an equal split
        by_class[int(images.labels[group[0]])].append(group)
    share = min(fraction, most / len(items)) if most else fraction
    taken: list[int] = []
    for label in sorted(by_class):
        candidates = by_class[label]
        quota = max(1, round(share * sum(map(len, candidates))))
        got = 0
        for position in rng.permutation(len(candidates))[: len(candidates) - leave]:
            if got >= quota:
                break
            taken += candidates[position]
            got += len(candidates[position])
    chosen = np.array(sorted(taken), dtype=np.int64)
    return np.setdiff1d(items, chosen), chosen
