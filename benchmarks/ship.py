"""Puts finished runs into the package: weights in 16 bits, scored again on the test part as they are stored.

    python ship.py RUN...        each becomes reslab/shipped/NET-DATA

Of a run, what says how it was made (run.toml), the artefact, its card, and one `test` record of the stored weights are kept.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from reslab.data.images import read_batches
from reslab.run import SHIPPED, Run, write_whole
from reslab.tensors import read_tensors, write_tensors
from reslab.use.artefact import FILES, model_folder
from reslab.use.card import write_card
from reslab.use.classifier import BATCH, load
from reslab.use.evaluate import outputs, score
from reslab.use.own import own_images


def ship(path: Path) -> None:
    run = Run.open(path)
    name = f"{run.config['net']}-{run.config['data']['name']}"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / name
        (made / "model").mkdir(parents=True)
        for file in FILES:  # what was measured on one machine stays out
            shutil.copyfile(model_folder(path) / file, made / "model" / file)
        weights, header = read_tensors(made / "model" / "weights.safetensors")
        halved = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
        write_tensors(made / "model" / "weights.safetensors", halved, header)
        shutil.copyfile(path / "run.toml", made / "run.toml")
        classifier = load(made)
        images = own_images(run)
        batches = read_batches(images, images.split["test"], classifier.preprocess.canvas, BATCH)
        scores = score(outputs(classifier, batches), classifier.classes, classifier.temperature)
        times = [record["time"] for record in run.records("end", "test")]
        record = {"kind": "test", "time": max(times), **scores}
        write_whole(made / "log.jsonl", (json.dumps(record) + "\n").encode())
        before = run.last("test")
        assert before
        card = write_card(made, Path(folder) / "card")
        shutil.copyfile(card / "README.md", made / "README.md")
        target = SHIPPED / name
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        shutil.move(made, target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{name}: test top-1 {scores['top1']:.2%} (n = {scores['n']:,}), in 32 bits {before['top1']:.2%}; {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    for each in sys.argv[1:]:
        ship(Path(each))
