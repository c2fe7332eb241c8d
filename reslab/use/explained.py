"""Image files -> heat maps over them, each at its image's own resolution, and the control that says what they are worth."""

import itertools
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from reslab.data.batches import Batches, choose_storage
from reslab.data.decode import Unreadable, decode_whole
from reslab.data.images import Images, read_image
from reslab.data.source import Progress, silent
from reslab.errors import CallError, shown
from reslab.nets.torch import ResNet
from reslab.run import Run, write_whole
from reslab.use.classifier import Classifier, Prediction, load
from reslab.use.explain import LAST, PLACED, check_method, class_index, evidence, on_canvas, prepared, rank_correlation, reinitialised
from reslab.use.features import features, nearest
from reslab.use.overlay import data_uri, fitted, overlay, png
from reslab.use.own import own_images
from reslab.use.sheet import write_sheet

SIDE = 320  # pixels of a picture on the page
SMALL = 128  # of a neighbour
DEPENDS = 0.5  # mean rank correlation with the control up to which maps count as the net's own; a trained net's are near 0
MOST_NEIGHBOURS = 100
NAME_LENGTH = 60  # of a file name without its ending: at most 240 bytes of UTF-8


@dataclass
class Explained:
    """One image: what the net said, for which class the map is, where it was written, and how like the control it is."""

    path: Path
    prediction: Prediction
    label: str
    file: str
    rank_correlation: float | None  # None where one of the two maps is the same everywhere
    pictures: dict[str, str]
    features: Tensor
    neighbours: list[dict[str, Any]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """All but the pictures, for JSON."""
        near = [{key: value for key, value in row.items() if key != "picture"} for row in self.neighbours]
        facts = {"image": str(self.path), **self.prediction._asdict(), "explained": self.label, "overlay": self.file}
        return {**facts, "rank_correlation": self.rank_correlation, **({"neighbours": near} if near else {})}


@dataclass(frozen=True)
class Explanations:
    """All that one call explained, and the files it could not read, with reasons."""

    out: Path
    method: str
    at: str
    explained: list[Explained]
    failed: dict[Path, str]

    @property
    def compared(self) -> int:
        """How many images have a control to compare with."""
        return sum(one.rank_correlation is not None for one in self.explained)

    @property
    def rank_correlation(self) -> float | None:
        """The control over all images: 0 for maps unrelated to those of random weights, 1 for the same, None where none could be compared."""
        known = [one.rank_correlation for one in self.explained if one.rank_correlation is not None]
        return sum(known) / len(known) if known else None

    @property
    def depends_on_weights(self) -> bool | None:
        """Whether the maps say something about this net, rather than about the images alone; None where nothing could be compared."""
        return None if self.rank_correlation is None else self.rank_correlation <= DEPENDS

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        rows = [one.facts() for one in self.explained] + [{"image": str(path), "error": reason} for path, reason in self.failed.items()]
        done = {
            "out": str(self.out),
            "sheet": str(self.out / "sheet.html"),
            "rank_correlation": self.rank_correlation,
            "depends_on_weights": self.depends_on_weights,
        }
        return {"method": self.method, "at": self.at if self.method in PLACED else None, **(done if self.explained else {}), "images": rows}


def explain_files(
    run: str | Path, paths: list[Path], method: str = "grad-cam", at: str = LAST, label: str | None = None, neighbours: int = 0,
    out: Path | None = None, reading: Progress = silent,
) -> Explanations:  # fmt: skip
    """Writes an overlay for each image file and sheet.html into `out`; nothing is written when no file can be read.

    Raises CallError for an unknown method, place or class and for a folder in use, before any image is read; WorkError
    when `neighbours` of the run's own training images are asked for and these are gone or have changed.
    """
    classifier = load(run)
    check_method(classifier.net, method, at)
    if label is not None:
        class_index(classifier, label)
    if not 0 <= neighbours <= MOST_NEIGHBOURS:
        raise CallError(f"--neighbours must be from 0 to {MOST_NEIGHBOURS}; received {neighbours}")
    found = Explanations(free_folder(out), method, at, [], {})
    own = own_images(Run.open(run), reading) if neighbours else None
    control, taken = reinitialised(classifier.net), set[str]()
    for done, path in enumerate(paths, start=1):
        try:
            found.explained.append(_explain(classifier, control, path, found, label, taken))
        except Unreadable as error:
            found.failed[path] = str(error)
        reading("explaining", done, len(paths))
    if found.explained:
        if own is not None:
            add_neighbours(classifier, found.explained, own, neighbours, reading)
        write_sheet(found, str(run), classifier.sure)
    return found


def _explain(classifier: Classifier, control: ResNet, path: Path, found: Explanations, label: str | None, taken: set[str]) -> Explained:
    data = read_image(path)
    pixels = classifier.decode(data)
    image = Image.fromarray(decode_whole(data))
    prediction = classifier.predict_pixels([pixels])[0]
    name = prediction.label if label is None else label
    batch = torch.from_numpy(pixels.copy())[None]
    x, labels = prepared(classifier, batch), torch.tensor([class_index(classifier, name)])
    maps, others = (evidence(net, x, labels, found.method, found.at) for net in (classifier.net, control))
    heat, random = (on_canvas(classifier, signed)[0] for signed in (maps, others))
    small = fitted(image, SIDE)
    pictures = {"image": small, "heat": overlay(small, heat, classifier.preprocess), "control": overlay(small, random, classifier.preprocess)}
    file = _file_name(path, taken)
    write_whole(found.out / file, png(overlay(image, heat, classifier.preprocess)))
    uris = {key: data_uri(picture) for key, picture in pictures.items()}
    (correlation,) = rank_correlation(maps, others, magnitude=found.method not in PLACED)
    return Explained(path, prediction, name, file, correlation, uris, features(classifier, batch)[0])


def add_neighbours(classifier: Classifier, explained: list[Explained], images: Images, n: int, reading: Progress = silent) -> None:
    """Gives each image the `n` training images whose features are most like its own. `images` are split."""
    canvas = classifier.preprocess.canvas
    batches = Batches(images, images.split["train"], canvas, choose_storage(images, canvas)[0])
    total = len(batches.items)
    batches.load(lambda done: reading("decoding train", done, total))
    queries = torch.stack([one.features for one in explained])
    found = nearest(classifier, queries, batches, n, lambda done, total: reading("comparing", done, total))
    for one, similarities, items in zip(explained, found.similarity.tolist(), found.items.tolist(), strict=True):
        one.neighbours = [_neighbour(images, item, similarity) for item, similarity in zip(items, similarities, strict=True)]


def free_folder(out: Path | None) -> Path:
    """`out`, which must be new or empty; by default explain/, or explain-2/ and so on when that is taken. Raises CallError."""
    if out is None:
        names = itertools.chain(["explain"], (f"explain-{i}" for i in itertools.count(2)))
        return next(path for path in map(Path, names) if not path.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CallError(f"--out must be a new or empty folder, so that no image is overwritten; {shown(out)} exists: choose another")
    return out


def _file_name(path: Path, taken: set[str]) -> str:
    """The image's own name, made safe, as .png; numbered when another has it, also one that differs only in case."""
    stem = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", path.stem))[:NAME_LENGTH].strip("-.") or "image"
    names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
    name = next(name for name in names if name.casefold() not in taken)
    taken.add(name.casefold())
    return f"{name}.png"


def _neighbour(images: Images, item: int, similarity: float) -> dict[str, Any]:
    try:
        pixels = images.pixels(item, min(SMALL, images.image_size))
        picture = data_uri(fitted(Image.fromarray(pixels.repeat(3 // pixels.shape[2], axis=2)), SMALL))
    except Unreadable:
        picture = ""
    return {"name": images.names[item], "label": images.classes[images.labels[item]], "similarity": similarity, "picture": picture}
