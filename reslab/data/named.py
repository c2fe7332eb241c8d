"""The data sets that have a name: scikit-learn's digits, CIFAR-10 and -100, MNIST and Fashion-MNIST.

Each is read from a copy that is already on the machine, where torchvision and Keras put theirs or under `RESLAB_DATA`;
otherwise the official archive is downloaded to `RESLAB_DATA`, or to ~/.cache/reslab.
"""

import gzip
import io
import os
import pickle
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from reslab.data.decode import Pixels
from reslab.data.images import Images, digest
from reslab.download import Archive, cache, fetch
from reslab.errors import WorkError, shown
from reslab.host import expanded

Progress = Callable[[str, int, int], None]
Part = tuple[Pixels, NDArray[np.int64]]  # uint8 NHWC, labels

CIFAR = {
    "cifar10": Archive("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": Archive("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
}
CIFAR_FILES = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "batches.meta", b"label_names", b"labels"),
    "cifar100": ("cifar-100-python", ["train"], ["test"], "meta", b"fine_label_names", b"fine_labels"),
}
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MNIST = {
    "mnist": [
        Archive("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", MNIST_URL + "train-images-idx3-ubyte.gz"),
        Archive("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", MNIST_URL + "train-labels-idx1-ubyte.gz"),
        Archive("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", MNIST_URL + "t10k-images-idx3-ubyte.gz"),
        Archive("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", MNIST_URL + "t10k-labels-idx1-ubyte.gz"),
    ],
    "fashion-mnist": [
        Archive("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", FASHION_URL + "train-images-idx3-ubyte.gz"),
        Archive("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe", FASHION_URL + "train-labels-idx1-ubyte.gz"),
        Archive("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79", FASHION_URL + "t10k-images-idx3-ubyte.gz"),
        Archive("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310", FASHION_URL + "t10k-labels-idx1-ubyte.gz"),
    ],
}
# torchvision's folder below its root, and Keras's cache
MNIST_PLACES = {"mnist": ("mnist", "MNIST/raw"), "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw")}
FASHION_CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = tuple("0123456789")
NAMED = ("digits", "cifar10", "cifar100", "mnist", "fashion-mnist")


def from_name(name: str, progress: Progress) -> Images:
    """One of `NAMED`. Raises WorkError when it is neither on the machine nor can be downloaded, or is damaged."""
    if name == "digits":
        return _digits()
    if name in CIFAR:
        return _cifar(name, progress)
    return _mnist(name, progress)


def roots() -> list[Path]:
    """Where copies are looked for, in order: RESLAB_DATA, our cache, torchvision's usual root, Keras's cache."""
    own = [given] if (given := os.environ.get("RESLAB_DATA")) else []
    keras = os.environ.get("KERAS_HOME", "~/.keras") + "/datasets"
    return [folder for path in (*own, "~/.cache/reslab", "data", "~/data", keras) if (folder := expanded(path))]


def _digits() -> Images:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    array = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # stored as 0..16
    return _images("digits", DIGITS, [("", (array, bunch.target.astype(np.int64)))], upright=True)


def _cifar(name: str, progress: Progress) -> Images:
    folder, train, test, meta, names_key, labels_key = CIFAR_FILES[name]
    inner = [f"{folder}", f"{folder.replace('-py', '')}-py-target/{folder}", f"{folder}-target/{folder}"]  # the latter two: Keras 3
    place = next((root / i for root in roots() for i in inner if (root / i / meta).is_file()), None)
    read: Callable[[str], bytes]
    if place is not None:
        read = lambda file: (place / file).read_bytes()  # noqa: E731
    else:
        archive = fetch(CIFAR[name], _download_folder(CIFAR[name].name), progress)
        members = {Path(m).name: data for m, data in _members(archive, folder)}
        read = members.__getitem__
    try:
        classes = tuple(_text(n) for n in _unpickle(read(meta))[names_key])
        parts = []
        for part, files in (("train", train), ("test", test)):
            batches = [_unpickle(read(file)) for file in files]
            data = np.concatenate([np.asarray(b[b"data"], dtype=np.uint8) for b in batches])
            labels = np.concatenate([np.asarray(b[labels_key], dtype=np.int64) for b in batches])
            parts.append((part, (data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)))
    except (OSError, LookupError, TypeError, AttributeError, ArithmeticError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise WorkError(f"the copy of {name} in {shown(place or folder)} is damaged ({shown(repr(error))[:80]}): remove it and run again") from error
    return _images(name, classes, parts)


def _members(archive: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(folder) and member.size < 1 << 28:
                stream = tar.extractfile(member)
                assert stream is not None
                yield member.name, stream.read()


def _mnist(name: str, progress: Progress) -> Images:
    archives = MNIST[name]
    keras = [root / "mnist.npz" for root in roots() if name == "mnist" and (root / "mnist.npz").is_file()]
    place = next((root / i for root in roots() for i in MNIST_PLACES[name] if all(_copy(root / i, a.name) for a in archives)), None)
    try:
        if place is None and keras:
            with np.load(keras[0], allow_pickle=False) as held:
                parts = [(p, (held[f"x_{p}"][..., None], held[f"y_{p}"].astype(np.int64))) for p in ("train", "test")]
        else:
            files = [_copy(place, a.name) if place else fetch(a, _download_folder(a.name, MNIST_PLACES[name][0]), progress) for a in archives]
            arrays = [_idx(file) for file in files if file]
            parts = [(p, (arrays[i][..., None], arrays[i + 1].astype(np.int64))) for p, i in (("train", 0), ("test", 2))]
    except (OSError, ValueError, LookupError, EOFError, struct.error, zlib.error, BadZipFile) as error:
        raise WorkError(f"the copy of {name} in {shown(place or 'the cache')} is damaged ({shown(repr(error))[:80]}): remove it and run again") from error
    return _images(name, DIGITS if name == "mnist" else FASHION_CLASSES, parts, upright=name == "mnist")


def _copy(folder: Path, archive: str) -> Path | None:
    """The archive or, as torchvision leaves it, its unpacked content."""
    return next((f for f in (folder / archive, folder / archive.removesuffix(".gz")) if f.is_file()), None)


def _idx(file: Path) -> NDArray[np.uint8]:
    """LeCun's IDX format: zero, zero, type 8 (uint8), the number of axes, each length as big-endian uint32, the data."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if data[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of bytes")
    axes = data[3]
    shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _download_folder(archive: str, inner: str = "") -> Path:
    """The first root that has the archive already; otherwise where downloads go."""
    places = (root / inner for root in roots())
    return next((place for place in places if (place / archive).is_file()), None) or cache() / inner


def _images(name: str, classes: tuple[str, ...], parts: list[tuple[str, Part]], upright: bool = False) -> Images:
    for part, (data, labels) in parts:
        shaped = data.dtype == np.uint8 and data.ndim == 4 and data.size and data.shape[1:] == parts[0][1][0].shape[1:] and labels.shape == data.shape[:1]
        if not shaped or labels.min() < 0 or labels.max() >= len(classes):
            has = f"{part or name} has images of shape {data.shape}, labels of shape {labels.shape}, {len(classes)} classes"
            raise WorkError(f"the copy of {name} is damaged: {has}: remove it and run again")
    array = np.ascontiguousarray(np.concatenate([data for _, (data, _) in parts]))
    labels = np.concatenate([labels for _, (_, labels) in parts])
    return Images(
        name=name,
        classes=classes,
        labels=labels,
        names=[f"{part or name}/{i}" for part, (data, _) in parts for i in range(len(data))],
        digests=[digest(memoryview(image).cast("B")) for image in array],
        sizes=np.tile(np.array(array.shape[2:0:-1], np.int32), (len(array), 1)),
        channels=array.shape[3],
        declared=[part for part, (data, _) in parts for _ in range(len(data))],
        array=array,
        source=name,
        upright=upright,
    )


class _PlainUnpickler(pickle.Unpickler):
    """Reads CIFAR's batches, which are pickles: numpy arrays and plain containers, nothing that could run."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not data")
        return super().find_class(module, name)


def _unpickle(data: bytes) -> dict[bytes, Any]:
    with warnings.catch_warnings():  # batches pickled by old versions of numpy make new ones warn
        warnings.simplefilter("ignore")
        held = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    if not isinstance(held, dict):
        raise ValueError("a batch must hold a dict")
    return {key if isinstance(key, bytes) else str(key).encode(): value for key, value in held.items()}


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
