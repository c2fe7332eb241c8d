"""What a net sees in an image, as a vector: the pooled features that its head reads. And the images nearest to one by it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from reslab.data.batches import Batches
from reslab.data.preprocess import Preprocess
from reslab.errors import CallError, shown
from reslab.run import write_whole
from reslab.use.classifier import BATCH, Classifier, load


class Neighbours(NamedTuple):
    """For each of N images the nearest n, nearest first: cosine similarity (N, n) and position in the Images (N, n)."""

    similarity: Tensor
    items: Tensor


def features(classifier: Classifier, pixels: Tensor) -> Tensor:
    """uint8 (N, canvas, canvas, C) -> float32 (N, features) on the CPU: what the head, `fc`, is given."""
    held: list[Tensor] = []
    handle = classifier.net.fc.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0]))
    try:
        classifier.logits(pixels.numpy())
    finally:
        handle.remove()
    assert isinstance(classifier.preprocess, Preprocess)  # where there is a net, there is
    return classifier.preprocess.answer(held[0].float()).cpu()


def nearest(classifier: Classifier, queries: Tensor, batches: Batches, n: int, progress: Callable[[int, int], None] = lambda done, total: None) -> Neighbours:
    """The `n` images of a part whose features are most like each query's (N, features), fewer where there are fewer.

    Memory does not grow with the part beyond its pixels. In float64: the likenesses of images of a class may differ by less
    than float32 tells apart from one.
    """
    queries, done = F.normalize(queries.double()), 0
    best = Neighbours(queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64))
    for batch in batches.epoch(BATCH):
        similarity = queries @ F.normalize(features(classifier, batch.pixels).double()).T
        both = torch.cat([best.similarity, similarity], 1)
        items = torch.cat([best.items, batch.items.expand(len(queries), -1)], 1)
        kept = both.topk(min(n, both.shape[1]), dim=1)
        best = Neighbours(kept.values, items.gather(1, kept.indices))
        done += len(batch.items)
        progress(done, len(batches.items))
    return best


def write_features(run: str | Path, images: list[Path], out: Path) -> tuple[int, int, dict[Path, str]]:
    """Features of image files -> an .npz of `paths`, unicode (N), and `features`, float32 (N, features); no pickle.

    Returns N, features, and why each other file could not be read. Nothing is written when no file can be.
    Raises CallError for a name that is not .npz, WorkError when it cannot be written.
    """
    if out.suffix.lower() != ".npz" or out.is_dir():
        raise CallError(f"--out must be a file that ends in .npz; received {shown(out)}")
    classifier = load(run)
    paths, rows, failed = list[str](), list[NDArray[np.float32]](), dict[Path, str]()
    for path, found in classifier.each(images, lambda decoded: features(classifier, torch.from_numpy(np.stack(decoded))).numpy()):
        if isinstance(found, str):
            failed[path] = found
        else:
            paths.append(str(path))
            rows.append(found)
    if rows:
        held = io.BytesIO()
        np.savez(held, paths=np.array(paths, dtype=np.str_), features=np.stack(rows))
        write_whole(out, held.getvalue())
    return len(rows), len(rows[0]) if rows else 0, failed
