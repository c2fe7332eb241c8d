import errno
import json
import os
import signal
import subprocess
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import reslab
from reslab.data.batches import Batches
from reslab.data.decode import Unreadable
from reslab.data.images import Images
from reslab.data.remote import Cache
from reslab.data.shards import INDEX, LANES, Members, Shard, _kept, shuffled, write_shards
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.download import digest
from reslab.errors import CallError, WorkError
from reslab.job import Silent
from reslab.spec import Spec
from reslab.train.fit import Interrupted
from tests.conftest import COLOURS, draw

SMALL = 0.02  # MiB: about 7 images a shard


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "photos"
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(24):
            draw(root / name / f"{i}.png", colour, 100 * c + i)
    return root


@pytest.fixture(scope="module")
def shards(photos: Path) -> Path:
    write_shards(open_images(photos), photos.parent / "shards", seed=3, mebibytes=SMALL)
    return photos.parent / "shards"


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    (tmp_path / "copy").mkdir()
    for file in shards.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "copy"


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{INDEX}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def address(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same shards served over HTTP, and an empty cache."""
    monkeypatch.setenv("RESLAB_DATA", str(tmp_path / "cache"))
    with served(shards) as address:
        yield address


def by_digest(images: Images) -> dict[str, tuple[str, str, bytes]]:
    """Of every image, by content: its class, its part, its pixels."""
    images = split(images, 3)
    part = {int(i): name for name, items in images.split.items() for i in items}
    return {images.digests[i]: (images.classes[images.labels[i]], part[i], images.pixels(i, 24).tobytes()) for i in range(len(images))}


def test_shards_hold_the_images_classes_and_split_of_the_folder(photos: Path, shards: Path) -> None:
    ours, theirs = open_images(shards), open_images(photos)
    assert by_digest(ours) == by_digest(theirs)
    assert split(ours, 0).fingerprint() == split(theirs, 3).fingerprint()
    assert (ours.sizes == 24).all()
    assert sorted(ours.names) == sorted(theirs.names)


def test_webdataset_reads_what_was_written(photos: Path, shards: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package itself
        import webdataset

        files = sorted(str(file) for file in shards.glob("*.tar"))
        rows = list(webdataset.WebDataset(files, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    theirs = open_images(photos)
    want = sorted((int(theirs.labels[i]), theirs.pixels(i, 24).tobytes()) for i in range(len(theirs)))
    assert sorted((int(label), pixels.tobytes()) for pixels, label in rows) == want


def test_a_declared_split_is_kept(photos: Path, tmp_path: Path) -> None:
    images = open_images(photos)
    declared = ["test" if i % 4 == 0 else "val" if i % 4 == 1 else "train" for i in range(len(images))]
    write_shards(replace(images, declared=declared), tmp_path / "out", mebibytes=SMALL)
    again = open_images(tmp_path / "out")
    assert dict(zip(again.digests, again.declared, strict=True)) == dict(zip(images.digests, declared, strict=True))


def test_equal_seeds_write_equal_bytes_and_others_do_not(photos: Path, shards: Path, tmp_path: Path) -> None:
    for seed in (3, 4):
        write_shards(open_images(photos), tmp_path / str(seed), seed=seed, mebibytes=SMALL)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    write_shards(open_images(photos), tmp_path / "link", seed=3, mebibytes=SMALL)
    for file in shards.iterdir():
        assert (tmp_path / "3" / file.name).read_bytes() == (tmp_path / "elsewhere" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "elsewhere").iterdir())) == len(list(shards.iterdir()))
    assert (tmp_path / "4" / "train-000000.tar").read_bytes() != (shards / "train-000000.tar").read_bytes()


def test_what_fails_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    images = open_images(photos)
    gone = replace(images, digests=["0" * 32, *images.digests[1:]])
    with pytest.raises(WorkError, match="does not: run again without it"):
        write_shards(gone, tmp_path / "out", mebibytes=SMALL)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    with pytest.raises(CallError, match="must be a new or empty folder"):
        write_shards(images, tmp_path / "used")
    with pytest.raises(CallError, match="made of image files"):
        write_shards(open_images("digits"), tmp_path / "out")


def test_the_order_takes_every_image_once_and_mixes_shards() -> None:
    shards = np.repeat(np.arange(40, dtype=np.int32), 100)
    order = shuffled(shards, 64, np.random.default_rng(0))
    assert sorted(order) == list(range(4000))
    assert not np.array_equal(order, shuffled(shards, 64, np.random.default_rng(1)))
    assert all(len(np.unique(shards[order[i : i + 64]])) >= LANES for i in range(0, 3900, 64))
    for batch_size in (1, 2, 100):
        assert sorted(shuffled(shards[:5], batch_size, np.random.default_rng(0))) == list(range(5))


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("batch_size", [32, 200])
def test_each_process_reads_its_own_shards(world: int, batch_size: int) -> None:
    """Other than at the ends of lanes, of which there are eight. A training gives each process a stretch of every batch."""
    shards = np.repeat(np.arange(40, dtype=np.int32), 100)
    batches = shuffled(shards, batch_size, np.random.default_rng(0)).reshape(-1, world, batch_size // world)
    read = [set(shards[batches[:, rank].ravel()]) for rank in range(world)]
    assert set().union(*read) == set(range(40))
    assert sum(map(len, read)) <= 40 + LANES - 1


class Stop(Silent):
    """Ctrl-C at the fourth step."""

    taken = 0

    def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
        self.taken += 1
        if self.taken == 4:
            os.kill(os.getpid(), signal.SIGINT)


def test_resumed_in_the_middle_of_shards_equals_uninterrupted(shards: Path, tmp_path: Path) -> None:
    given = {"net": Spec("basic", (1,), (8,), "conv3"), "epochs": 2, "batch_size": 16, "seed": 1, "storage": "stream"}
    whole = reslab.train(shards, out=tmp_path / "whole", **given)
    with pytest.raises(Interrupted):
        reslab.train(shards, out=tmp_path / "cut", show=Stop(), **given)
    again = reslab.train(resume=tmp_path / "cut")
    ours, theirs = (load_file(run.model / "weights.safetensors") for run in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_image_that_was_changed_is_not_used(copied: Path) -> None:
    images = open_images(copied)
    assert isinstance(images.paths, Members)
    shard, offset = copied / images.paths[0].shard.name, images.paths[0].offset
    data = bytearray(shard.read_bytes())
    data[offset + 40] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Unreadable, match="other bytes there than its index says"):
        images.pixels(0, 24)
    assert images.pixels(1, 24).shape == (24, 24, 3)


def forge(folder: Path, change: object, resealed: bool) -> None:
    """Changes the first shard's index; `resealed` by somebody who can change shards.json too."""
    held = json.loads((folder / INDEX).read_text())
    file = folder / held["shards"][0]["name"].replace(".tar", ".json")
    table = json.loads(file.read_text())
    change(table)  # type: ignore[operator]
    file.write_text(json.dumps(table))
    if resealed:
        held["shards"][0]["index_sha256"] = digest(file)
        (folder / INDEX).write_text(json.dumps(held))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["offsets"].__setitem__(0, -512), lambda t: t["bytes"].__setitem__(0, 1 << 40), lambda t: t["labels"].__setitem__(0, 3),
        lambda t: t["digests"].__setitem__(0, "x"), lambda t: t["names"].pop(), lambda t: t.pop("widths"), lambda t: t["labels"].__setitem__(0, True),
        lambda t: t["digests"].__setitem__(0, 10**31), lambda t: t["names"].__setitem__(0, "a" * (2 << 20)), lambda t: t["widths"].__setitem__(0, 0),
        lambda t: t["heights"].__setitem__(0, 1 << 31), lambda t: t["bytes"].__setitem__(0, 0), lambda t: t["offsets"].__setitem__(0, 10**9),
        lambda t: t["labels"].__setitem__(0, -1), lambda t: t["names"].__setitem__(0, 5),
    ],
)  # fmt: skip
def test_a_forged_index_is_refused_in_one_line(change: object, copied: Path) -> None:
    forge(copied, change, resealed=True)
    with pytest.raises(WorkError, match="must be those that") as caught:
        open_images(copied)
    assert "\n" not in str(caught.value)


def test_an_index_that_is_not_the_one_named_is_refused(copied: Path) -> None:
    forge(copied, lambda t: t["labels"].reverse(), resealed=False)
    with pytest.raises(WorkError, match="must be those that"):
        open_images(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["shards"][0].update(name="../train.tar"), lambda h: h["shards"][0].update(images=0), lambda h: h.update(classes="ab"),
        lambda h: h.update(format="x"), lambda h: h["shards"].clear(), lambda h: h["shards"][0].update(sha256=None), lambda h: h.pop("name"),
        lambda h: h["shards"][0].update(sha256=10**63), lambda h: h["shards"][1].update(name=h["shards"][0]["name"]),
        lambda h: h["shards"][0].update(part="all"), lambda h: h["shards"][0].update(bytes=0), lambda h: h["shards"][0].update(images=True),
        lambda h: h.update(channels=2), lambda h: h.update(upright=1), lambda h: h["classes"].__setitem__(1, h["classes"][0]),
        lambda h: h["shards"][0].update(images=1 << 29), lambda h: h["shards"][0].update(index_sha256="0" * 63),
    ],
)  # fmt: skip
def test_a_forged_list_of_shards_is_refused_in_one_line(change: object, copied: Path) -> None:
    held = json.loads((copied / INDEX).read_text())
    change(held)  # type: ignore[operator]
    (copied / INDEX).write_text(json.dumps(held))
    with pytest.raises(WorkError, match="no index that") as caught:
        open_images(copied)
    assert "\n" not in str(caught.value)


def test_members_are_what_the_index_says_and_have_plain_names(shards: Path) -> None:
    images = open_images(shards)
    assert isinstance(images.paths, Members)
    for file in shards.glob("*.tar"):
        with tarfile.open(file) as tar:
            assert all(member.isreg() and "/" not in member.name for member in tar)
    for i in range(3):
        member = images.paths[i]
        with tarfile.open(shards / member.shard.name) as tar:
            inside = next(m for m in tar if m.offset_data == member.offset)
            data = tar.extractfile(inside)
            assert data is not None
            assert data.read() == member.read_bytes()


def test_remote_shards_give_the_same_images_and_few_stay(address: str, shards: Path) -> None:
    images = open_images(address)
    assert by_digest(images) == by_digest(open_images(shards))
    assert isinstance(images.paths, Members)
    cache = Cache(images.paths.where.address, kept=2)  # type: ignore[union-attr]
    for file in cache.folder.glob("*/*.tar"):
        file.unlink()
    for shard in images.paths.shards:
        with cache.open(shard) as file:
            assert file.read() == (shards / shard.name).read_bytes()
    left = {file.name for file in cache.folder.glob("*/*.tar")}
    assert len(left) == 2
    assert images.paths.shards[-1].name in left


def test_data_comes_over_https_only() -> None:
    with pytest.raises(CallError, match="comes over https"):
        open_images("http://example.org/shards.json")


def test_remote_shards_that_were_changed_are_refused(address: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reslab.data.remote.PATIENCE", 0.0)
    images = open_images(address)
    assert isinstance(images.paths, Members)
    false = replace(images.paths, shards=tuple(shard._replace(sha256="0" * 64) for shard in images.paths.shards))
    with pytest.raises(WorkError, match="must have SHA-256"):
        replace(images, paths=false).pixels(0, 24)
    with pytest.raises(WorkError, match=r"^\w+-000000\.tar must have SHA-256") as caught:
        list(Batches(replace(images, paths=false), np.arange(8), 24, "stream", workers=1).epoch(4))
    assert "\n" not in str(caught.value)


def test_an_address_without_shards_is_one_line(address: str) -> None:
    with pytest.raises(WorkError, match=r"could not be had .*check the address"):
        open_images(address.replace(INDEX, "nothing.json"))
    with pytest.raises(CallError, match="written in ASCII"):
        open_images(address.replace(INDEX, "ä.json"))


def test_what_the_server_does_not_have_is_asked_for_once(address: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reslab.data.remote.time.sleep", lambda seconds: pytest.fail("it waits for what will not come"))
    held = Cache(address.replace(INDEX, "nowhere/"), kept=2)
    with pytest.raises(WorkError, match=r"File not found\): put http\S+ into \S+$"):
        held.fetched("train-000000.json", "0" * 64)
    (held.folder / ("0" * 16)).mkdir(parents=True, exist_ok=True)
    (held.folder / ("0" * 16) / "a.tar").write_bytes(b"another's")
    with pytest.raises(WorkError, match=r"a\.tar must have SHA-256"):
        held.fetched("a.tar", "0" * 64)


def test_an_index_beyond_all_bounds_is_not_downloaded_to_its_end(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reslab.data.remote.MAX_INDEX", 100)
    with pytest.raises(WorkError, match=r"could not be had \(it has over 100 bytes\)"):
        open_images(address)


def test_a_disk_that_is_full_is_no_fault_of_an_image(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(address)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("reslab.data.remote.PATIENCE", 0.0)
    monkeypatch.setattr("reslab.download._download", full)
    with pytest.raises(WorkError, match=r"could not be downloaded \(No space left on device\)"):
        images.pixels(0, 24)
    monkeypatch.setattr("reslab.data.remote.fetch", full)
    with pytest.raises(WorkError, match=r"it refuses \(No space left on device\): make room"):
        images.pixels(0, 24)


def test_a_shard_for_which_another_process_left_no_room_is_fetched_again(address: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(address)
    images.pixels(0, 24)
    touch, left = os.utime, [True]

    def too_late(path: Path) -> None:
        touch(path)
        if left and left.pop():
            path.unlink()

    monkeypatch.setattr("os.utime", too_late)
    assert (images.pixels(0, 24) == open_images(shards).pixels(0, 24)).all()
    assert not left


def test_shards_that_were_published_anew_are_fetched_anew(photos: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESLAB_DATA", str(tmp_path / "cache"))
    with served(copied) as address:
        before = open_images(address).pixels(0, 24)
        for file in copied.iterdir():
            file.unlink()
        write_shards(open_images(photos), copied, seed=4, mebibytes=SMALL)
        after = open_images(address).pixels(0, 24)
    assert (after == open_images(copied).pixels(0, 24)).all()
    assert not (after == before).all()


def test_a_last_shard_of_few_images_does_not_let_the_cache_grow() -> None:
    full = [Shard(f"train-{i:06d}.tar", "train", 1400, 1 << 27, "", "") for i in range(1000)]
    rest = [Shard("train-001000.tar", "train", 3, 1 << 19, "", ""), Shard("val-001001.tar", "val", 1, 1 << 19, "", "")]
    assert _kept(tuple(full)) == 32
    assert _kept(tuple(full + rest)) == 40


def test_what_is_no_image_is_said_when_shards_are_written(tmp_path: Path, words: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for i in range(24):
        draw(tmp_path / "set" / ("a" if i % 2 else "b") / f"{i}.png", (10, 20, 30), i)
    (tmp_path / "set" / "a" / "bad.png").write_bytes(b"no image")
    done = words("shard", tmp_path / "set", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 file(s) left out: a/bad.png (not an image" in done.stdout + done.stderr
    assert "24 images in 3 shards" in done.stdout
