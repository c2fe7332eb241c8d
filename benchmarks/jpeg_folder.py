"""A folder of 60,000 small JPEGs in train/ and test/, made from CIFAR-10, against CIFAR-10 itself: same path, same accuracy.

    python benchmarks/jpeg_folder.py [EPOCHS]        two trainings of 8 epochs, one after the other

JPEG at quality 95 changes the pixels a little. Decoding happens once: the time of an epoch must be that of the arrays.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import keep, train
from PIL import Image

from reslab.data.source import open_images


def make_folder(root: Path, most: int) -> None:
    images = open_images("cifar10")
    assert images.array is not None
    for i in [*range(most * 5), *range(50_000, 50_000 + most)]:
        folder = root / images.declared[i] / images.classes[images.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.array[i]).save(folder / f"{i}.jpg", quality=95)


if __name__ == "__main__":
    smoke = "--smoke" in sys.argv
    epochs = next((argument for argument in sys.argv[1:] if argument.isdigit()), "1" if smoke else "8")
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "cifar-jpeg", 200 if smoke else 10_000)
        start = time.monotonic()
        runs = {"folder": train(Path(folder) / "cifar-jpeg", "--net", "resnet20", "--epochs", epochs)}
        if not smoke:
            runs["arrays"] = train("cifar10", "--net", "resnet20", "--epochs", epochs)
    lines = [f"ResNet-20, {epochs} epochs, the same seed and recipe; JPEG quality 95"]
    for name, run in runs.items():
        test, took = run.last("test"), [r["seconds"] for r in run.records if r["kind"] == "epoch"]
        each = [b - a for a, b in zip([0.0, *took], took, strict=False)]
        lines.append(
            f"{name}: test top-1 {test['top1']:.2%} [{test['top1_low']:.2%}, {test['top1_high']:.2%}], n = {test['n']}; "
            f"{run.records[0]['time']:.1f} s until the plan, "
            f"{statistics.median(each):.1f} s an epoch (median), {run.seconds:.0f} s in all, {run.peak_gib:.2f} GiB"
        )
    keep("jpeg_folder", lines)
