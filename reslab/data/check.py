"""The data doctor: what is wrong with a data set, found before epoch 1.

A problem makes the answer of a training untrustworthy (unreadable files, leakage, contradicting labels); a note is
worth knowing. Near-duplicates are images whose 64-bit difference hash (Krawetz 2013) differs in at most 3 bits.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reslab.data.decode import Unreadable
from reslab.data.images import Images, in_threads
from reslab.data.split import too_small_to_split
from reslab.errors import shown

NEAR_BITS = 3
BANDS = 4  # of 16 bits: two hashes at most 3 bits apart agree in one of them
HASH_SIDE = 32  # smaller images have too little structure for the hash to tell them apart
MOST_ALIKE = 10  # later images that one is paired with in a band: of n that are all alike, fewer than n * n / 2 pairs say so
MOST_SHARED = 5000  # images that share a band of the hash, beyond which it says nothing of them
IMBALANCE = 10.0
ODD_ASPECT = 3.0

Hashes = NDArray[np.uint64]


class Finding(NamedTuple):
    """One thing that was found. `names` are the files it is about, if any."""

    kind: str
    is_problem: bool
    text: str
    names: list[str]


class Checkup(NamedTuple):
    """All that was found, and the counts that a table shows."""

    counts: dict[str, dict[str, int]]  # class -> part -> images
    sizes: dict[str, list[int]]  # width and height: smallest, median, largest
    findings: list[Finding]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing that was found is a problem."""
        return not any(finding.is_problem for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"healthy": self.is_healthy, "counts": self.counts, "sizes": self.sizes, "findings": [f._asdict() for f in self.findings]}


def check(images: Images, progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> Checkup:
    """Everything: the cheap part, then every image is decoded, for broken data and for near-duplicates."""
    broken, hashes = _hashes(images, progress)
    findings = [*_cheap(images, broken), *_near(images, hashes)]
    return Checkup(_counts(images), _sizes(images), findings)


def cheap_check(images: Images) -> list[str]:
    """What needs no decoding, as lines for a person."""
    return [finding.text for finding in _cheap(images, [])]


def _cheap(images: Images, broken: list[tuple[str, str]]) -> Iterable[Finding]:
    unreadable = [*images.problems, *broken]
    if unreadable:
        names = [f"{shown(name)} ({reason})" for name, reason in unreadable]
        yield _finding("unreadable", True, f"{len(names)} file(s) left out: ", names)
    for note in images.notes:
        yield Finding("empty" if note.is_problem else "stray", note.is_problem, note.text, [])
    if too_small := too_small_to_split(images):
        yield Finding("classes", True, too_small, [])
    counts = np.bincount(images.labels, minlength=len(images.classes))
    if counts.max() > IMBALANCE * max(1, counts.min()):
        most, least = (shown(images.classes[int(i)]) for i in (counts.argmax(), counts.argmin()))
        text = f"imbalance: {most} has {counts.max()} images, {least} {counts.min()}; --balance weights or sampling evens them"
        yield Finding("imbalance", False, text, [])
    yield from _exact(images)
    ratio = images.sizes.max(axis=1) / np.maximum(images.sizes.min(axis=1), 1)
    odd = np.flatnonzero(ratio > ODD_ASPECT)
    if len(odd):
        yield _finding(
            "aspect",
            False,
            f"{len(odd)} image(s) more than {ODD_ASPECT:g} times as long as wide, of which the middle is used: ",
            [shown(images.names[int(i)]) for i in odd],
        )


def _parts(images: Images) -> list[str]:
    """Where each image is declared to be; what is in no part is split with train, where byte-identical images stay together."""
    return [declared or "train" for declared in images.declared]


def _exact(images: Images) -> Iterable[Finding]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, held in enumerate(images.digests):
        groups[held].append(i)
    repeated = [group for group in groups.values() if len(group) > 1]
    across_classes = [g for g in repeated if len({int(images.labels[i]) for i in g}) > 1]
    part = _parts(images)
    leaks = [g for g in repeated if len({part[i] for i in g}) > 1]
    within = [g for g in repeated if len({(int(images.labels[i]), part[i]) for i in g}) == 1]
    if across_classes:
        yield _pairs(images, "contradiction", True, f"{len(across_classes)} image(s) under more than one class: ", across_classes)
    if leaks:
        yield _pairs(images, "leakage", True, f"{len(leaks)} image(s) in more than one of train, val and test: ", leaks)
    if within:
        yield _pairs(
            images,
            "duplicates",
            False,
            f"{len(within)} image(s) more than once in a class; copies are kept on one side of the split: ",
            within,
        )


def _near(images: Images, hashes: Hashes) -> Iterable[Finding]:
    if np.median(images.sizes.min(axis=1)) < HASH_SIDE:
        yield Finding("near", False, f"near-duplicates were not looked for: below {HASH_SIDE} px the hash cannot tell images apart", [])
        return
    pairs = [(i, j) for i, j in near_pairs(hashes) if images.digests[i] != images.digests[j]]
    part = _parts(images)
    some = "at least " if max(Counter(i for i, _ in pairs).values(), default=0) >= MOST_ALIKE else ""
    leaks = [[i, j] for i, j in pairs if part[i] != part[j]]
    across = [[i, j] for i, j in pairs if images.labels[i] != images.labels[j] and part[i] == part[j]]
    others = [[i, j] for i, j in pairs if images.labels[i] == images.labels[j] and part[i] == part[j]]
    for kind, found, text in (
        ("near-leakage", leaks, "near-duplicate pair(s) across train, val and test: "),
        ("near-contradiction", across, "near-duplicate pair(s) under different classes: "),
        ("near", others, "near-duplicate pair(s) within a class: "),
    ):
        if found:
            yield _pairs(images, kind, False, f"{some}{len(found)} {text}", found)


def near_pairs(hashes: Hashes) -> list[tuple[int, int]]:
    """Pairs i < j of hashes that differ in at most 3 bits. Flat images, whose hash is zero, are passed over.

    Of an image with very many like it the first ones are found, so that each of these is in a pair and memory stays in bounds.
    """
    found: set[tuple[int, int]] = set()
    for band in range(BANDS):
        keys = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.lexsort((np.arange(len(keys)), keys))
        bounds = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] + np.uint64(1)))
        for group in np.split(order, bounds[1:]) if len(order) else []:
            group = group[hashes[group] != 0]
            if 2 <= len(group) <= MOST_SHARED:
                for at, i in enumerate(group[:-1], 1):
                    close = group[at:][np.bitwise_count(hashes[group[at:]] ^ hashes[i]) <= NEAR_BITS]
                    found |= {(int(i), int(j)) for j in close[:MOST_ALIKE]}
    return sorted(found)


def difference_hash(pixels: NDArray[np.uint8]) -> int:
    """64 bits: of 9 x 8 grey values, whether each is brighter than the next one in its row."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("L").resize((9, 8), Image.Resampling.BOX)
    grey = np.asarray(image).astype(np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes(), "big")


def _hashes(images: Images, progress: Callable[[str, int, int], None]) -> tuple[list[tuple[str, str]], Hashes]:
    """Every image decoded: those that cannot be, and the difference hash of the others."""
    size = max(HASH_SIDE, min(64, images.image_size)) if images.array is None else images.image_size
    broken: list[tuple[str, str]] = []
    hashes = np.zeros(len(images), np.uint64)

    def look(i: int) -> None:
        try:
            hashes[i] = difference_hash(images.pixels(i, size))
        except Unreadable as error:
            broken.append((images.names[i], str(error)))

    in_threads(look, len(images), lambda done, n: progress("looking", done, n))
    return sorted(broken), hashes


def _finding(kind: str, is_problem: bool, text: str, names: list[str]) -> Finding:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return Finding(kind, is_problem, text + ", ".join(names[:3]) + more, names)


def _pairs(images: Images, kind: str, is_problem: bool, text: str, groups: list[list[int]]) -> Finding:
    return _finding(kind, is_problem, text, [" = ".join(shown(images.names[i]) for i in group[:4]) for group in groups])


def _counts(images: Images) -> dict[str, dict[str, int]]:
    parts = sorted(set(images.declared))
    declared = np.asarray(images.declared, dtype="U5")
    return {name: {part or "all": int(((images.labels == label) & (declared == part)).sum()) for part in parts} for label, name in enumerate(images.classes)}


def _sizes(images: Images) -> dict[str, list[int]]:
    return {
        name: [int(column.min()), int(np.median(column)), int(column.max())] for name, column in (("width", images.sizes[:, 0]), ("height", images.sizes[:, 1]))
    }
