"""The images that a run was trained on: opened again, and only when they are still the same."""

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
        source, fingerprint = config["data"]["source"], config["data"]["fingerprint"]
        seed, val, channels = config["recipe"]["seed"], config["recipe"].get("val"), config["spec"]["in_channels"]
    except (KeyError, TypeError) as error:
        raise WorkError(f"{shown(run.path / 'run.toml')} is damaged: it lacks {shown(str(error))}") from error
    try:
        images = split(open_images(source, reading), seed, val)
    except CallError as error:
        raise WorkError(f"this needs the data that the run was trained on; {shown(source)} is gone: move it back") from error
    if images.fingerprint() != fingerprint:
        raise WorkError(f"this needs the data that the run was trained on; {shown(source)} has changed since: restore it")
    return replace(images, channels=channels)
