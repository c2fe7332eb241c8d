"""Prediction on a Ray cluster, with the code that predicts here: each machine loads the run once and takes lists of files."""

from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path

from reslab.cluster import spread
from reslab.run import located
from reslab.use.classifier import Classifier, Prediction, load

CHUNK = 256  # files that a machine takes at a time

Found = tuple[Path, Prediction | str]


def predict_each(run: str | Path, images: Iterable[str | Path], address: str) -> Iterator[Found]:
    """As `Classifier.predict_each`, in the same order, by the machines of a cluster, which must see `run` and the images.

    `address` is as in `reslab.cluster.spread`, and so are the errors.
    """
    paths = (Path(image) for image in images)
    chunks: Iterator[list[Path]] = iter(lambda: list(islice(paths, CHUNK)), [])
    for chunk, found in spread(partial(_predict, located(run).absolute(), Path.cwd()), chunks, address):
        yield from zip(chunk, found, strict=True)


def _predict(run: Path, folder: Path, paths: list[Path]) -> list[Prediction | str]:
    """Of paths that are relative to a folder, which is not where this process is."""
    return [found for _, found in _loaded(run).predict_each([folder / path for path in paths])]


@cache
def _loaded(run: Path) -> Classifier:
    return load(run)
