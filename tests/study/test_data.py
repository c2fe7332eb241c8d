"""Prepared images that one study reads while another writes them."""

import errno
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

import reslab
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.study.data import load, prepare


def test_images_that_a_study_has_mapped_are_not_written_over_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has looked for facts.json before it was there."""
    images = split(open_images("digits"), 0)
    mapped, folder = prepare(images, 8, tmp_path)
    facts = (folder / "facts.json").read_bytes()
    (folder / "facts.json").unlink()
    with (folder / "train.npy").open("rb") as held:
        size = os.fstat(held.fileno()).st_size

        def half(file: BinaryIO, array: Any, allow_pickle: bool) -> None:
            file.write(b"half")
            assert os.fstat(held.fileno()).st_size == size, "whoever reads a mapped file that was cut is killed"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(np, "save", half)
            with pytest.raises(reslab.WorkError, match="No space left on device"):
                prepare(images, 8, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["test.npy", "test_labels.npy", "train.npy", "train_labels.npy"]
    again, _ = prepare(images, 8, tmp_path)
    assert np.array_equal(mapped.train, again.train)
    assert (folder / "facts.json").read_bytes() == facts
    assert load(folder).facts == mapped.facts


def test_images_that_cannot_be_read_today_make_other_data(folder: Path, tmp_path: Path) -> None:
    """A share that was away for a moment must not leave fewer images under the name of all."""
    images, store = split(open_images(folder), 0), tmp_path / "store"
    assert images.paths
    lost = images.paths[images.split["train"][0]]
    assert isinstance(lost, Path)
    held = lost.read_bytes()
    lost.write_bytes(b"away")
    fewer, _ = prepare(images, 24, store)
    lost.write_bytes(held)
    whole, there = prepare(images, 24, store)
    assert (fewer.facts.left_out, whole.facts.left_out) == (1, 0)
    assert len(whole.train) == len(fewer.train) + 1 == len(images.split["train"])
    assert fewer.facts.fingerprint != whole.facts.fingerprint == there.name


def test_damaged_images_say_what_to_delete(tmp_path: Path) -> None:
    _, folder = prepare(split(open_images("digits"), 0), 8, tmp_path)
    (folder / "test.npy").write_bytes(b"")
    with pytest.raises(reslab.WorkError, match="are damaged: delete that folder"):
        load(folder)
