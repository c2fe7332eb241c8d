"""Photos of 500x375 to training batches at 224 px, by one worker: ours against torchvision v2 on PIL. In turns, medians.

    python pipeline_224.py            two minutes; asked: >= 3x
    python pipeline_224.py --smoke    seconds; figures that mean nothing

Both read the files, decode them, take a random resized crop, mirror at random, change brightness, contrast, saturation and
hue, and normalise. Ours decodes a file in every epoch only where the pixels do not fit in memory (a stream); otherwise once.
Every worker is one thread.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measure import keep, oracle, ratio
from PIL import Image
from scipy.ndimage import gaussian_filter

from reslab.data import augment
from reslab.data.boxes import Boxes, cut, least_side, resized
from reslab.data.decode import Pixels, decode, decode_square
from reslab.data.preprocess import Preprocess
from reslab.host import keep_freed_memory

SMOKE = "--smoke" in sys.argv
ROUNDS, PHOTOS, BATCH = (1, 8, 8) if SMOKE else (7, 128, 32)
SIZE, CANVAS, JITTER = 224, 256, 0.4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photos(root: Path) -> list[Path]:
    """Smooth noise, which JPEG packs about as small as it does photographs."""
    rng, paths = np.random.default_rng(0), [root / f"{i}.jpg" for i in range(PHOTOS)]
    for path in paths:
        rough = gaussian_filter(rng.normal(size=(375, 500, 3)), (2, 2, 0)) * 300
        Image.fromarray(np.clip(128 + rough, 0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


class Ours:
    """As `reslab.train` does it with `--crop resized --flip random --jitter 0.4`."""

    def __init__(self) -> None:
        self.preprocess = Preprocess(SIZE, CANVAS, 3, np.array(MEAN, np.float32), np.array(STD, np.float32))
        self.generator = torch.Generator().manual_seed(0)

    def streamed(self, paths: list[Path], jitter: float = JITTER) -> torch.Tensor:
        boxes = resized(len(paths), self.generator)
        squares = [decode_square(path.read_bytes(), least_side(box, SIZE), 3) for path, box in zip(paths, boxes, strict=True)]
        return self._augmented(squares, boxes, jitter)

    def held(self, squares: Sequence[Pixels], jitter: float = JITTER) -> torch.Tensor:
        return self._augmented(squares, resized(len(squares), self.generator), jitter)

    def _augmented(self, squares: Sequence[Pixels], boxes: Boxes, jitter: float) -> torch.Tensor:
        pixels = torch.stack([cut(square, box, SIZE) for square, box in zip(squares, boxes, strict=True)])
        pixels = augment.flip(pixels, torch.rand(len(pixels), generator=self.generator) < 0.5, across=2)
        x = self.preprocess.unit(pixels, torch.device("cpu"))
        x = self.preprocess.normalise(augment.jitter(x, jitter, self.generator) if jitter else x)
        return x.contiguous(memory_format=torch.channels_last)


class Theirs:
    """The reference transforms of torchvision, version 2, on PIL images."""

    def __init__(self, jitter: float = JITTER) -> None:
        v2 = oracle("torchvision.transforms.v2")
        colour = [v2.ColorJitter(jitter, jitter, jitter, jitter / 4)] if jitter else []
        steps = [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip(), *colour, v2.PILToTensor()]
        self.transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __call__(self, paths: list[Path]) -> torch.Tensor:
        return torch.stack([self.transform(Image.open(path).convert("RGB")) for path in paths])


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, theirs, plain = Ours(), Theirs(), Theirs(0.0)
    with tempfile.TemporaryDirectory() as folder:
        paths = photos(Path(folder))
        batches = [paths[i : i + BATCH] for i in range(0, PHOTOS, BATCH)]
        held = [[decode(path.read_bytes(), CANVAS, 3) for path in batch] for batch in batches]
        ways = {
            "ours, a stream": lambda i: ours.streamed(batches[i]),
            "ours, held in memory": lambda i: ours.held(held[i]),
            "torchvision": lambda i: theirs(batches[i]),
            "ours, a stream without colour": lambda i: ours.streamed(batches[i], 0.0),
            "torchvision without colour": lambda i: plain(batches[i]),
        }
        took: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(ROUNDS + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                for i in range(len(batches)):
                    assert way(i).shape == (BATCH, 3, SIZE, SIZE)
                if turn or SMOKE:
                    took[name].append((time.perf_counter() - start) / PHOTOS)
        size = statistics.mean(path.stat().st_size for path in paths) / 1000
    lines = [f"{PHOTOS} JPEGs of 500x375, {size:.0f} kB each, to batches of {BATCH} at {SIZE} px; one thread, medians of {ROUNDS} in turns"]
    lines += [f"  {name:30} {1000 * statistics.median(seconds):6.2f} ms an image" for name, seconds in took.items()]
    pairs = (("ours, a stream", "torchvision"), ("ours, held in memory", "torchvision"), ("ours, a stream without colour", "torchvision without colour"))
    for one, other in pairs:
        lines.append(f"  {one} against {other}: {ratio(took[other], took[one])}")
    keep("pipeline_224", lines)


if __name__ == "__main__":
    main()
