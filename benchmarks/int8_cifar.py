"""int8 of trained CIFAR-10 nets: accuracy, size and latency beside our fp32 ONNX.

python benchmarks/int8_cifar.py RUN...        run folders, such as of ResNet-20 and ResNet-56; under a minute each
asked: drop <= 0.5 points, size <= 0.30x, batch-1 latency <= 0.75x, or refused with the numbers

The verdict is on val, as `reslab export RUN --to onnx --int8` gives it; the drop on test is measured beside it.
"""

import sys
import tempfile
from pathlib import Path

from measure import keep, train_here

from reslab.data.images import read_batches
from reslab.errors import WorkError
from reslab.run import Run
from reslab.use.classifier import BATCH, load
from reslab.use.evaluate import outputs
from reslab.use.export import export
from reslab.use.own import own_images
from reslab.use.quantize import in_words


def measured(run: Path, folder: Path) -> list[str]:
    """What the export says, and test top-1 of the net and of the file."""
    try:
        found = export(run, "onnx", folder / "int8.onnx", precision="int8")
    except WorkError as error:
        return [f"{run.name}: {error}"]
    verdict, how = found.facts["verdict"], found.facts["conversion"]
    ratios = {size: times["converted"] / times["fp32"] for size, times in verdict["seconds"].items()}
    right = {}
    for name, path in (("fp32", run), ("int8", found.path)):
        classifier = load(path)
        images = own_images(Run.open(run))
        out = outputs(classifier, read_batches(images, images.split["test"], classifier.preprocess.canvas, BATCH))
        right[name] = float((out.logits.argmax(1) == out.labels).mean())
    return [
        f"{run.name}: {in_words(verdict)}",
        f"  {how['method']} ranges from {how['calibration_images']} images{', first and last layer in fp32' if how['float_ends'] else ''}",
        f"  test top-1 {right['fp32']:.2%} -> {right['int8']:.2%} ({100 * (right['fp32'] - right['int8']):+.2f} points lost), n = {len(out.labels):,}",
        f"  size {verdict['bytes']['converted'] / verdict['bytes']['fp32']:.3f}x, latency {ratios[1]:.2f}x at batch 1, {ratios[16]:.2f}x at batch 16",
    ]


if __name__ == "__main__":
    runs = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--")]
    with tempfile.TemporaryDirectory() as folder:
        if "--smoke" in sys.argv and not runs:
            runs = [train_here("digits", Path(folder) / "digits", "--epochs", "2")]
        if not runs:
            sys.exit(__doc__)
        keep("int8_cifar", ["reslab export RUN --to onnx --int8", *(line for run in runs for line in measured(run, Path(folder)))])
