"""Prepared images that one study reads while another writes them."""

import errno
import os
from pathlib import Path
from typing import Any

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

        def half(file: Path, array: Any, allow_pickle: bool) -> None:
            Path(file).write_bytes(b"half")
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
