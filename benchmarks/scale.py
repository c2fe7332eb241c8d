"""What a training on ImageNet-22k with 1,000 GPUs would ask for: arithmetic from the spec, and what can be measured here.

    python benchmarks/scale.py            about a minute
    python benchmarks/scale.py --smoke    seconds; the measured lines mean nothing

docs/scale.md reads these lines, and says where the constants below are from.
"""

import io
import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from measure import keep
from PIL import Image, ImageFilter

import reslab
from reslab.catalogue.memory import memory
from reslab.data.decode import decode
from reslab.data.source import open_images
from reslab.host import cores

SMOKE = "--smoke" in sys.argv
FILES = 60 if SMOKE else 1500
GPUS, IMAGES, CLASSES, JPEG = 1000, 14_197_122, 21_841, 92_000  # the last in bytes an image
PEAK, HBM = 989e12, 3.35e12  # bf16 FLOP/s and bytes/s of an H100 SXM
LINKS = {"100 Gbit/s": 12.5e9, "400 Gbit/s": 50e9}  # bytes/s a GPU
PASSES = 6  # times that an activation crosses the memory bus: written and read forward; it, its gradient twice, and once more backward
LOST = 16_384 * 54 * 24 / 419  # GPU hours between unexpected interruptions


def arithmetic(name: str, batch: int) -> list[str]:
    spec = reslab.spec(name, num_classes=CLASSES)
    cost = spec.cost(224)
    head = next(layer.params for layer in spec.layers(224) if layer.kind == "linear") / cost.params
    gradients = 4 * cost.params
    ring = 2 * (GPUS - 1) / GPUS * gradients
    compute = 3 * 2 * cost.macs * batch / PEAK
    traffic = PASSES * cost.activations / 2 * batch / HBM
    step = max(compute, traffic)
    kept = memory(spec, 224, batch).kept / 2
    steps = IMAGES / (GPUS * batch)
    sends = ", ".join(f"{1000 * ring / speed:.1f} ms at {link}" for link, speed in LINKS.items())
    return [
        f"{name}, {CLASSES:,} classes: {cost.params:,} parameters, {head:.0%} of them in the head; {cost.macs / 1e9:.2f} G multiply-adds an image; "
        f"batch {batch} a GPU, {GPUS * batch:,} in all",
        f"  a step: {1000 * compute:.1f} ms of arithmetic at peak; {1000 * traffic:.1f} ms of memory traffic if nothing is fused; the longer is taken below",
        f"  gradients {gradients / 2**20:.0f} MiB in fp32; a ring all-reduce sends {ring / 2**20:.0f} MiB a GPU and step: {sends}",
        f"  activations {kept / 2**30:.2f} GiB in bf16 for the backward pass; state {2 * gradients / 2**20:.0f} MiB with one momentum",
        f"  an epoch is {steps:,.0f} steps, {steps * step:.1f} s of them; {GPUS * batch / step / 1e6:.2f} M images/s, "
        f"{GPUS * batch / step * JPEG / 1e9:.0f} GB/s of JPEG, {batch / step:,.0f} images/s a GPU",
    ]


def photos(root: Path) -> bytes:
    """Files of 500 x 375 pixels with the detail of photographs, none like another; and one of them."""
    rng = np.random.default_rng(0)
    blurred = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(2))
    for i in range(FILES):
        path = root / "ab"[i % 2] / f"n{i:08}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = blurred.copy()
        image.putpixel((i % 500, i // 500), (255, 255, 255))
        held = io.BytesIO()
        image.save(held, "JPEG", quality=90)
        path.write_bytes(held.getvalue())
    return held.getvalue()


def measured() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        one = photos(Path(folder) / "photos")
        times = []
        for _ in range(FILES // 5):
            start = time.perf_counter()
            decode(one, 256, 3)
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        images = open_images(str(Path(folder) / "photos"))
        reading = (time.perf_counter() - start) / len(images)
        tracemalloc.start()
        images = open_images(str(Path(folder) / "photos"))
        held = tracemalloc.get_traced_memory()[0] / len(images)
    rate = 1 / statistics.median(times)
    return [
        f"measured here: a core decodes {rate:,.0f} JPEGs of 500 x 375 a second to 256 px ({len(one) / 1000:.0f} kB each)",
        f"measured here: reading, checking and hashing a folder takes {1e6 * reading:.0f} us an image ({cores()} cores), and holds "
        f"{held:.0f} bytes an image; for {IMAGES:,} images that is {reading * IMAGES / 60:.0f} min and {held * IMAGES / 2**30:.1f} GiB, in every process",
    ]


if __name__ == "__main__":
    lines = [f"ImageNet-22k ({IMAGES:,} images, {CLASSES:,} classes) on {GPUS:,} H100, at 224 px"]
    for name, batch in (("resnet50", 32), ("resnet50", 256), ("resnet152", 32)):
        lines += arithmetic(name, batch)
    lines.append(f"a job on {GPUS:,} GPUs is interrupted every {LOST / GPUS:.0f} hours")
    keep("scale", lines + measured())
