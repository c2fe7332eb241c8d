import errno
import os
from pathlib import Path

import pytest

import reslab
from reslab.run import Run, write_whole


def test_writing_replaces_files_and_what_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name, data in (("file", b"first"), ("link", b"second"), ("new/file", b"third")):
        write_whole(tmp_path / name, data)
        assert (tmp_path / name).read_bytes() == data
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "new"]


def test_two_that_write_one_file_at_once_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, waiting = os.fsync, [b"second"]

    def other_first(file: int) -> None:
        sync(file)
        if waiting:
            write_whole(tmp_path / "file", waiting.pop())
            assert (tmp_path / "file").read_bytes() == b"second"

    monkeypatch.setattr(os, "fsync", other_first)
    write_whole(tmp_path / "file", b"first")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_written_leaves_what_was_there_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", b"before")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode, "readable by whom any file is"

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(reslab.WorkError, match=r"cannot be written: .*; what was there is kept"):
            write_whole(path, b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "plain"]


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


def test_a_line_that_a_crash_cut_short_costs_no_other_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.mend()
    assert not (tmp_path / "log.jsonl").exists()
    run.record("epoch", epoch=1)
    run.mend()
    whole = (tmp_path / "log.jsonl").read_bytes()
    assert whole.count(b"\n") == 1
    (tmp_path / "log.jsonl").write_bytes(whole + b'{"kind": "epo')
    run.mend()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write("5\n")
    run.record("epoch", epoch=2)
    assert [record["epoch"] for record in run.records("epoch")] == [1, 2]
