"""The images that a run was trained on: opened again, and only when they are still the same."""

import json
from dataclasses import replace

from reslab.data.images import Images
from reslab.data.source import Progress, open_images, silent
from reslab.data.split import split
from reslab.errors import CallError, WorkError, shown
from reslab.run import Run


def own_images(run: Run, reading: Progress = silent) -> Images:
    """The run's own images, split as it split them. Raises WorkError when they are gone or have changed since."""
    config = run.config
    try:
        source, fingerprint, classes = config["data"]["source"], config["data"]["fingerprint"], config["data"].get("classes")
        seed, val, channels = config["recipe"]["seed"], config["recipe"].get("val"), config["spec"]["in_channels"]
    except (KeyError, TypeError) as error:
        raise WorkError(f"{shown(run.path / 'run.toml')} is damaged: it lacks {shown(str(error))}") from error
    try:
        images = split(open_images(source, reading), seed, val)
    except CallError as error:
        raise WorkError(f"this needs the data that the run was trained on; {shown(source)} is gone: move it back") from error
    if what := changed(images, fingerprint, classes):
        raise WorkError(f"this needs the data that the run was trained on; {shown(source)} {what}: restore it")
    return replace(images, channels=channels)


def changed(images: Images, fingerprint: str, classes: list[str] | None) -> str:
    """What is not as run.toml has it, of split images; empty where all is. The outputs of a net go by the order of the classes."""
    if images.fingerprint() != fingerprint:
        return "has changed since"
    return "has its classes in another order now" if classes is not None and list(images.classes) != classes else ""


def reordered(images: Images, run: Run) -> str:
    """Says so where the parts of split images are not in the order of the run's split.json: a training's random numbers go by position."""
    try:
        held = json.loads((run.path / "split.json").read_text("utf-8"))
        same = all([images.digests[i] for i in items] == [digest for digest, _ in held[part]] for part, items in images.split.items())
    except FileNotFoundError:  # another process's disk may have it
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkError(f"{shown(run.path / 'split.json')} cannot be read: {shown(str(error))[:120]}") from error
    return "" if same else "has its images in another order now"
