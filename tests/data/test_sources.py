import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from reslab.data import named
from reslab.data.source import open_images
from reslab.download import Archive, fetch
from reslab.errors import CallError, WorkError
from tests.conftest import COLOURS, draw


def test_digits_are_the_real_ones() -> None:
    images = open_images("digits")
    assert (len(images), images.classes, images.channels, images.image_size, images.upright) == (1797, tuple("0123456789"), 1, 8, True)
    assert images.array is not None
    assert (images.array.min(), images.array.max()) == (0, 255)


def test_folder_is_read_in_natural_order_with_rotation_and_grey(folder: Path) -> None:
    images = open_images(folder)
    assert images.classes == ("blue", "green", "red")
    assert [images.names[i] for i in (0, 1, 2, 10)] == ["blue/0.png", "blue/1.png", "blue/2.png", "blue/10.png"]
    assert (images.image_size, images.channels, images.upright) == (24, 3, False)


def test_declared_split_is_respected(folder: Path) -> None:
    root = folder.parent / "declared"
    for part, first in (("train", 0), ("val", 10), ("test", 20)):
        for c, (name, colour) in enumerate(COLOURS.items()):
            for i in range(first, first + 4):
                draw(root / part / name / f"{i}.png", colour, 100 * c + i)
    images = open_images(root)
    assert images.classes == ("blue", "green", "red")
    assert {part: images.declared.count(part) for part in ("train", "val", "test", "")} == {"train": 12, "val": 12, "test": 12, "": 0}


def test_a_class_called_train_is_a_class(folder: Path) -> None:
    (folder / "red").rename(folder / "train")
    assert open_images(folder).classes == ("blue", "green", "train")


def test_test_images_without_classes_beside_train_are_no_class(folder: Path) -> None:
    root = folder.parent / "competition"
    root.mkdir()
    folder.rename(root / "train")
    draw(root / "test" / "1.png", "red", 1)
    images = open_images(root)
    assert images.classes == ("blue", "green", "red")
    assert images.notes == (("folder test has no class folders and was left out", False),)


def test_numbers_as_folder_names_sort_by_value(folder: Path) -> None:
    for old, new in (("red", "10"), ("green", "9"), ("blue", "1")):
        (folder / old).rename(folder / new)
    images = open_images(folder)
    assert images.classes == ("1", "9", "10")
    assert not images.upright  # of more than ten classes the numbers say nothing of what is to be seen


def test_digits_and_letters_as_folder_names_are_characters(folder: Path) -> None:
    for old, new in (("red", "7"), ("green", "A"), ("blue", "ß")):
        (folder / old).rename(folder / new)
    assert open_images(folder).upright


def test_a_class_folder_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "red" / "more").mkdir()
    draw(folder / "red" / "more" / "25.png", COLOURS["red"], 25)
    look = os.scandir

    def guarded(path: str) -> object:
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr("os.scandir", guarded)
    images = open_images(folder)
    assert images.problems == (("red/more", "Permission denied"),)
    assert len(images) == 72


@pytest.mark.parametrize("data", ["http://[x", "~nobody-of-that-name/x"])
def test_what_is_neither_path_nor_address_is_one_line(data: str) -> None:
    with pytest.raises(CallError, match=r"DATA must be a path, an address or one of digits.*; received .*:") as caught:
        open_images(data)
    assert "\n" not in str(caught.value)


def test_odd_names_are_kept(folder: Path) -> None:
    names = ["with space", "emoji 🦊", "<script>alert(1)</script>".replace("/", "_"), "new\nline"]
    for i, name in enumerate(names):
        draw(folder / name / f"{name}.png", (10, 20, 30), 900 + i)
    images = open_images(folder)
    assert set(names) < set(images.classes)
    assert not images.problems


def test_bad_files_are_left_out_by_name(folder: Path) -> None:
    (folder / "red" / "empty.png").touch()
    (folder / "red" / "text.jpg").write_text("hello")
    (folder / "red" / "cut.png").write_bytes((folder / "red" / "1.png").read_bytes()[:300])
    (folder / "red" / "notes.txt").write_text("no image, no problem")
    images = open_images(folder)
    assert {p.name: p.reason.split(":")[0].split(" (")[0] for p in images.problems} == {
        "red/cut.png": "truncated", "red/empty.png": "empty file", "red/text.jpg": "not an image of a known format"
    }  # fmt: skip
    assert len(images) == 72


def test_links_stay_inside_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = draw(tmp_path / "outside" / "x.png", (1, 2, 3), 7)
    (folder / "red" / "leaves.png").symlink_to(outside)
    (folder / "red" / "loop.png").symlink_to(folder / "red" / "loop.png")
    (folder / "red" / "up").symlink_to(folder)
    (folder / "loop").symlink_to(folder)
    (folder / "red" / "inside.png").symlink_to(folder / "blue" / "1.png")
    images = open_images(folder)
    assert sorted(p.name for p in images.problems) == ["loop", "red/leaves.png", "red/loop.png", "red/up"]
    assert len(images) == 73
    assert images.classes == ("blue", "green", "red")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "has none: put the images of each class"),
        (lambda d: draw(d / "loose.png", (1, 1, 1), 0), "has none: put the images of each class"),
        (lambda d: (d / "a").mkdir(), "no images were found"),
        (lambda d: [(d / c).mkdir() or (d / c / "x.png").write_text("?") for c in "ab"], "none of the 2 files"),
    ],
    ids=["empty", "loose", "empty class", "no readable image"],
)
def test_folders_without_images_say_what_to_do(make, message: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    make(tmp_path / "d")
    with pytest.raises(WorkError, match=message):
        open_images(tmp_path / "d")


def test_unknown_sources_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="did you mean 'cifar10'"):
        open_images("cifar1O")
    with pytest.raises(CallError, match="there is no"):
        open_images(tmp_path / "nowhere" / "at.all")
    (tmp_path / "a.txt").touch()
    with pytest.raises(CallError, match="is a file"):
        open_images(tmp_path / "a.txt")


def write_csv(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    file = folder / "labels.csv"
    file.write_text(text, encoding=encoding)
    return file


def test_csv_with_bom_numbers_and_split(folder: Path) -> None:
    rows = [f"{name}/{i}.png,{c},{'test' if i > 18 else 'train'}" for c, name in enumerate(COLOURS) for i in range(24)]
    images = open_images(write_csv(folder, "path,label,split\n" + "\n".join(rows), "utf-8-sig"))
    assert images.classes == ("0", "1", "2")
    assert images.declared.count("test") == 15


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("file,class\na,b\n", "utf-8", "must have the columns path and label; .* has file, class"),
        ("", "utf-8", "has no rows"),
        ("path,label\nred/1.png,red\nred/none.png,red\n", "utf-8", "1 of 2 are not, first 'red/none.png'"),
        ("path,label\nred/1.png,\n", "utf-8", "needs a path and a label"),
        ("path,label,split\nred/1.png,red,holdout\n", "utf-8", "train, val or test"),
        ("path,label\nred/é.png,red\n", "latin-1", "must be UTF-8"),
    ],
)
def test_bad_csvs_say_what_to_do(folder: Path, text: str, encoding: str, message: str) -> None:
    with pytest.raises(WorkError, match=message):
        open_images(write_csv(folder, text, encoding))


# -- named data sets, from archives made here in the official formats --


def fake_cifar() -> bytes:
    rng = np.random.default_rng(0)
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        files = {f"data_batch_{i}": 20 for i in range(1, 6)} | {"test_batch": 20}
        batches = {name: {b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), b"labels": [i % 10 for i in range(n)]} for name, n in files.items()}
        batches["batches.meta"] = {b"label_names": [f"c{i}".encode() for i in range(10)]}
        for name, value in batches.items():
            body = pickle.dumps(value, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return held.getvalue()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine: no copies anywhere but where a test puts them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RESLAB_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Server:
    """Serves `body`; cuts the connection after `cut` bytes if that is set; remembers the ranges asked for."""

    def __init__(self, body: bytes) -> None:
        self.body, self.cut, self.ranges = body, 0, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                outer.ranges.append(asked)
                start = int(asked[6:-1]) if asked else 0
                self.send_response(206 if asked else 200)
                rest = outer.body[start:]
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[: outer.cut] if outer.cut else rest)

            def log_message(self, *arguments: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/a.bin"
        threading.Thread(target=partial(self.http.serve_forever, 0.05), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server(os.urandom(600_000))
    yield served
    served.http.shutdown()
    served.http.server_close()


def test_interrupted_download_is_resumed_and_checked(server: Server, tmp_path: Path) -> None:
    archive = Archive("a.bin", hashlib.md5(server.body).hexdigest(), server.url)
    server.cut = 400_000
    with pytest.raises(WorkError, match="could not be downloaded"):
        fetch(archive, tmp_path, lambda *a: None)
    assert not (tmp_path / "a.bin").exists()
    server.cut = 0
    seen: list[tuple[str, int, int]] = []
    assert fetch(archive, tmp_path, lambda *a: seen.append(a)).read_bytes() == server.body
    assert server.ranges == [None, "bytes=400000-"]
    assert seen[-1] == ("a.bin", 600_000, 600_000)


def test_corrupted_download_is_removed_and_said(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"must have MD5 0{32}; what came had .* run the command again"):
        fetch(Archive("a.bin", "0" * 32, server.url), tmp_path, lambda *a: None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_data_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkError, match=r"a\.bin is needed and could not be downloaded"):
        fetch(Archive("a.bin", "0" * 32, "https://localhost/a.bin"), tmp_path / "file", lambda *a: None)


@pytest.mark.parametrize("checksum", ["", "right"])
def test_of_those_who_need_a_file_at_once_one_downloads_it(server: Server, tmp_path: Path, checksum: str) -> None:
    archive = Archive("a.bin", checksum and hashlib.md5(server.body).hexdigest(), server.url)

    def slowly(*_: object) -> None:
        time.sleep(0.05)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: fetch(archive, tmp_path, slowly).read_bytes(), range(3)))
    assert found == [server.body] * 3
    assert len(server.ranges) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_a_copy_with_another_checksum_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"another mirror's")
    with pytest.raises(WorkError, match=r"a.bin must have MD5 0{32}; it has"):
        fetch(Archive("a.bin", "0" * 32, "http://127.0.0.1:9/a.bin"), tmp_path, lambda *a: None)
    assert (tmp_path / "a.bin").exists()


def test_offline_says_which_file_to_put_where(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(named.CIFAR, "cifar10", named.CIFAR["cifar10"]._replace(url="http://127.0.0.1:9/cifar-10-python.tar.gz"))
    with pytest.raises(WorkError, match=r"cifar-10-python.tar.gz is needed .* put http.* into .*data, or set RESLAB_DATA"):
        open_images("cifar10")


def test_cifar_is_read_from_the_archive_or_unpacked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = fake_cifar()
    monkeypatch.setitem(named.CIFAR, "cifar10", Archive("cifar-10-python.tar.gz", hashlib.md5(body).hexdigest(), "http://127.0.0.1:9/x"))
    (home / "data").mkdir()
    (home / "data" / "cifar-10-python.tar.gz").write_bytes(body)
    packed = open_images("cifar10")
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        tar.extractall(home / "home" / ".keras" / "datasets", filter="data")
    (home / "data" / "cifar-10-python.tar.gz").unlink()
    unpacked = open_images("cifar10")
    assert (len(packed), packed.declared.count("test"), packed.classes[3]) == (120, 20, "c3")
    assert packed.digests == unpacked.digests
    assert np.array_equal(packed.array, unpacked.array)


def test_a_cifar_batch_that_would_run_code_is_refused(home: Path) -> None:
    folder = home / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(b"cposix\nsystem\n(S'touch exploited'\ntR.")
    with pytest.raises(WorkError, match=r"damaged .*posix.system is not data"):
        open_images("cifar10")
    assert not (home / "exploited").exists()


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_read_as_torchvision_leaves_it(home: Path, packed: bool) -> None:
    folder = home / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        for name, array in (
            ("images-idx3", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)),
            ("labels-idx1", (np.arange(n) % 10).astype(np.uint8)),
        ):
            body, file = idx(array), folder / f"{part}-{name}-ubyte"
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(body)) if packed else file.write_bytes(body)
    images = open_images("mnist")
    assert (len(images), images.channels, images.upright, images.image_size) == (60, 1, True, 28)
    assert list(images.labels[40:43]) == [0, 1, 2]


def test_a_damaged_copy_is_one_line(home: Path) -> None:
    folder = home / "data" / "fashion-mnist"
    folder.mkdir(parents=True)
    for archive in named.MNIST["fashion-mnist"]:
        (folder / archive.name).write_bytes(b"not gzip")
    with pytest.raises(WorkError, match=r"copy of fashion-mnist in .* is damaged"):
        open_images("fashion-mnist")
