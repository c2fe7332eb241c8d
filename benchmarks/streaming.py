"""Predicting the images of a folder: time an image and resident memory, from a thousand files to a million.

    python benchmarks/streaming.py            about 25 minutes, on a quiet machine; needs a million free inodes
    python benchmarks/streaming.py --smoke    seconds; figures that mean nothing

Asked: time an image flat within 10 % from 1,000 to 1,000,000 files, resident growth at most 300 MiB. The files are hard
links to 64 photos; what runs is all of `reslab predict RUN FOLDER --out predictions.csv`. Each larger folder is stopped three
or ten times on its way to do the smallest again, three times over, so that what else the machine does meets both alike; ratios are of medians.
Neither's beginning is timed, nor what was read ahead: the clock starts at the 512th answer after each.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from measure import keep
from PIL import Image

import reslab
from reslab.data.folder import image_paths
from reslab.data.preprocess import Preprocess
from reslab.use.artefact import TorchModel
from reslab.use.classifier import Classifier
from reslab.use.predictions import Answers, write_file

SMOKE = "--smoke" in sys.argv
SIZES = (200, 1_000, 2_000) if SMOKE else (1_000, 10_000, 100_000, 1_000_000)
SKIPPED = 64 if SMOKE else 512  # answers before the clock starts
SIDE = 32


def resident() -> float:
    """MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def photos(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    files = [folder / f"{i}.jpg" for i in range(64)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIDE, SIDE)).save(file)
    return files


def fill(folder: Path, n: int, files: list[Path]) -> Path:
    folder.mkdir()
    for i in range(n):
        os.link(files[i % len(files)], folder / f"{i}.jpg")  # a file has at most 65,000 names
    return folder


def tiny() -> Classifier:
    """Quick, so that what is measured is not the net."""
    spec = replace(reslab.spec("resnet20"), depths=(1, 1, 1))
    ends = np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32)
    return Classifier(TorchModel(reslab.build(spec).eval(), Preprocess(SIDE, SIDE, 3, *ends)), tuple("abcdefghij"))


class Measured:
    """What a stream of `n` answers costs in each of its `parts`, seen from inside, and what is done after each."""

    def __init__(self, n: int, parts: int) -> None:
        self.part, self.seconds, self.reference, self.most = n // parts, list[float](), list[float](), 0.0

    def through(self, answers: Answers, between: Callable[[], float] | None = None) -> Iterator:
        start = 0.0
        for i, answer in enumerate(answers, 1):
            yield answer
            if i % 100 == 0:
                self.most = max(self.most, resident())
            if i % self.part == SKIPPED:
                start = time.perf_counter()
            if i % self.part == 0:
                self.seconds.append((time.perf_counter() - start) / (self.part - SKIPPED))
                if between:
                    self.reference.append(between())


def main() -> None:
    classifier = tiny()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        files = photos(root)
        small = fill(root / "small", SIZES[0], files)

        def once() -> float:
            measured = Measured(3 * SIZES[0], 1)
            paths = chain.from_iterable(image_paths(small) for _ in range(3))
            write_file(measured.through(classifier.predict_each(paths)), root / "small.csv")
            return measured.seconds[0]

        loaded = resident()
        once()
        lines = [f"{SIDE} px JPEGs, a small net; resident after loading {loaded:.0f} MiB, after the first {3 * SIZES[0]:,} images {resident():.0f} MiB"]
        for n in SIZES[1:]:
            parts = max(3, min(10, n // 10_000))
            folder, measured = fill(root / str(n), n, files), Measured(n, parts)
            write_file(measured.through(classifier.predict_each(image_paths(folder)), once), root / "many.csv")
            here, there = (statistics.median(times) for times in (measured.seconds, measured.reference))
            lines.append(
                f"{n:9,} files: {1e6 * here:5.0f} us an image, {SIZES[0]:,} files {1e6 * there:5.0f} us: {here / there:.3f}x (medians of {parts}); "
                f"resident at most {measured.most:.0f} MiB, {measured.most - loaded:+.0f} since loading"
            )
    keep("streaming", lines)


main()
