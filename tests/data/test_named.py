"""Named data sets, from archives made here in the official formats, and how they are downloaded."""

import gc
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
from reslab.errors import WorkError


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
    """Serves `body`, or sends `elsewhere` if that is set; cuts the connection after `cut` bytes if that is set; remembers the ranges asked for."""

    def __init__(self, body: bytes) -> None:
        self.body, self.cut, self.ranges, self.elsewhere = body, 0, [], ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                outer.ranges.append(asked)
                start = int(asked[6:-1]) if asked else 0
                self.send_response(302 if outer.elsewhere else 206 if asked else 200)
                rest = outer.body[start:]
                self.send_header("Location", outer.elsewhere)
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # urllib leaves the reply open
def test_an_address_that_is_none_is_one_line_also_where_a_server_names_it(server: Server, tmp_path: Path) -> None:
    server.elsewhere = "http://[bad/"
    for address in (server.url, "https://a..b/a.bin"):
        with pytest.raises(WorkError, match=r"a\.bin is needed and could not be downloaded") as caught:
            fetch(Archive("a.bin", "0" * 32, address), tmp_path, lambda *a: None)
        assert "\n" not in str(caught.value)
        del caught
    gc.collect()


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


@pytest.mark.parametrize(
    ("meta", "batch"),
    [
        ({b"label_names": 3}, {}),
        ({b"label_names": [b"a"]}, {b"data": [[300] * 3072], b"labels": [0]}),
        ({b"label_names": [b"a"]}, {b"data": None, b"labels": [0]}),
        ({b"label_names": [b"a"]}, {b"data": [[3] * 3072], b"labels": [[0, 1]]}),
    ],
)
def test_a_damaged_cifar_batch_is_one_line(home: Path, meta: object, batch: object) -> None:
    folder = home / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch))
    with pytest.raises(WorkError, match=r"copy of cifar10 .*damaged"):
        open_images("cifar10")


@pytest.mark.parametrize(
    "arrays",
    [
        [(40,), (40, 28, 28), (20, 28, 28), (20,)],
        [(40, 28, 28), (30,), (20, 28, 28), (30,)],
        [(0, 28, 28), (0,), (0, 28, 28), (0,)],
        [(40, 28, 28), (40,), (20, 27, 27), (20,)],
    ],
    ids=["swapped", "uneven", "empty", "of two sizes"],
)
def test_copies_of_mnist_that_do_not_fit_together_are_one_line(home: Path, arrays: list[tuple[int, ...]]) -> None:
    folder = home / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for archive, shape in zip(named.MNIST["mnist"], arrays, strict=True):
        (folder / archive.name.removesuffix(".gz")).write_bytes(idx(np.zeros(shape, np.uint8)))
    with pytest.raises(WorkError, match=r"the copy of mnist is damaged: \w+ has images of shape"):
        open_images("mnist")


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
