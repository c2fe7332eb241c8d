import os
from pathlib import Path

import pytest

import reslab
from reslab.run import write_whole


def test_writing_replaces_files_and_what_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name, data in (("file", b"first"), ("link", b"second"), ("new/file", b"third")):
        write_whole(tmp_path / name, data)
        assert (tmp_path / name).read_bytes() == data
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "new"]


def test_folders_pipes_and_devices_are_not_replaced(tmp_path: Path) -> None:
    """Renaming a file over /dev/null would work for root, and break the machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to(os.devnull)
    for name in ("pipe", "device", "."):
        with pytest.raises(reslab.WorkError, match="it is not a regular file"):
            write_whole(tmp_path / name, b"data")
    assert (tmp_path / "pipe").is_fifo()
    assert Path(os.devnull).is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "pipe"]
