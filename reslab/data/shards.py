"""Images in tar shards, for data sets that no disk holds: written once, then read from a folder or over https.

    OUT/shards.json           classes, split, seed; each shard's images, bytes and SHA-256, and those of its index
    OUT/train-000000.tar      members 000000000.jpg and 000000000.cls, as `webdataset` reads them; images are kept byte for byte
    OUT/train-000000.json     its index: where each image lies, its class, content hash and size in pixels

Images are shuffled by a seed when they are written; each part of the split has shards of its own. Nothing is ever
unpacked: an image is the bytes from `offset` on, and is used only when their content hash is the index's. Everything
read may come from anyone, and is believed as far as it was checked.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urljoin, urlsplit

import numpy as np
from numpy.typing import NDArray

from reslab.data.images import MAX_IMAGE, SPLITS, Images, Indices, digest
from reslab.data.remote import Cache, read_url
from reslab.data.split import split
from reslab.download import digest as file_digest
from reslab.errors import CallError, WorkError, shown
from reslab.run import workplace

INDEX = "shards.json"
FORMAT = "reslab-shards-1"
SHARD_MIB = 128.0
MOST_MIB = 2048  # of a shard, before its last image: what is fetched has at most 4 GiB
MAX_IMAGES = 1 << 28
INDEX_BASE, INDEX_ROW = 1 << 20, 1 << 10  # bytes of a shard's index, at most: for long names, and for each image
NUMBERS = ("labels", "offsets", "bytes", "widths", "heights")
COLUMNS = ("names", "digests", *NUMBERS)
BLOCK = 512  # of a tar
LANES, BUFFER = 8, 2048

Progress = Callable[[str, int, int], None]


class Shard(NamedTuple):
    """A tar file of one part of the split, as the index names it."""

    name: str
    part: str
    images: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Members:
    """Where each image of an Images lies: `paths` of images that are no files of their own."""

    shards: tuple[Shard, ...]
    shard_of: NDArray[np.int32]
    offsets: Indices
    lengths: Indices
    digests: Sequence[str]
    where: "Folder | Cache"

    def __len__(self) -> int:
        return len(self.shard_of)

    def __getitem__(self, index: int) -> "Member":
        return Member(self.where, self.shards[self.shard_of[index]], int(self.offsets[index]), int(self.lengths[index]), self.digests[index])


class Member(NamedTuple):
    """One image inside a shard."""

    where: "Folder | Cache"
    shard: Shard
    offset: int
    length: int
    digest: str

    def read_bytes(self) -> bytes:
        """Its file. Raises OSError when the shard does not hold it, WorkError when a remote shard cannot be had."""
        with self.where.open(self.shard) as shard:
            shard.seek(self.offset)
            data = shard.read(self.length)
        if digest(data) != self.digest:
            raise OSError(None, f"{self.shard.name} holds other bytes there than its index says")
        return data


@dataclass(frozen=True)
class Folder:
    """Shards that lie in a folder."""

    path: Path

    def open(self, shard: Shard) -> BinaryIO:
        return (self.path / shard.name).open("rb", buffering=0)


def write_shards(images: Images, out: Path, seed: int = 0, mebibytes: float = SHARD_MIB, progress: Progress = lambda what, done, n: None) -> dict[str, Any]:
    """Writes a folder of shards and returns what its shards.json holds. A split that the images declare is kept, what lacks is made.

    Raises CallError when `out` is in use or the images are no files, WorkError when one cannot be read or written.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CallError(f"OUT must be a new or empty folder; {shown(out)} is neither: choose another")
    if not 0 < mebibytes <= MOST_MIB:
        raise CallError(f"--shard-size must be above 0 and at most {MOST_MIB} MiB; received {mebibytes}")
    if images.paths is None or isinstance(images.paths, Members):
        raise CallError(f"shards are made of image files; {shown(images.name)} has none: give a folder or a CSV")
    made = split(images, seed)
    with workplace(out / INDEX if out.exists() else out) as folder:  # what is there may be another disk
        shards: list[Shard] = []
        done = 0
        for number, part in enumerate(SPLITS):
            items = np.random.default_rng([seed, number]).permutation(made.split[part])
            while len(items):
                shard, items = _write_shard(images, items, folder, f"{part}-{len(shards):06d}", part, round(mebibytes * 2**20))
                shards.append(shard)
                done += shard.images
                progress("writing", done, len(images))
        counts = {part: np.bincount(images.labels[made.split[part]], minlength=len(images.classes)).tolist() for part in SPLITS}
        held = {
            "format": FORMAT, "name": images.name, "seed": seed, "classes": list(images.classes), "channels": images.channels,
            "upright": images.upright, "counts": counts, "shards": [shard._asdict() for shard in shards],
        }  # fmt: skip
        (folder / INDEX).write_text(json.dumps(held, indent=1), "utf-8")
        out.mkdir(exist_ok=True)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == INDEX):  # the list of all comes last
            file.rename(out / file.name)
    return held


def _write_shard(images: Images, items: Indices, folder: Path, name: str, part: str, limit: int) -> tuple[Shard, Indices]:
    """The next shard, and the images that are left for others."""
    columns: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    target = folder / f"{name}.tar"
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for count, item in enumerate(items.tolist()):
            if count and tar.offset >= limit:
                items = items[count:]
                break
            data = _read(images, item)
            key, label = f"{item:09d}", int(images.labels[item])
            offset = _add(tar, f"{key}{_suffix(images.names[item])}", data)
            _add(tar, f"{key}.cls", str(label).encode())
            row = (images.names[item], images.digests[item], label, offset, len(data), *map(int, images.sizes[item]))
            for column, value in zip(COLUMNS, row, strict=True):
                columns[column].append(value)
        else:
            items = items[:0]
    index = target.with_suffix(".json")
    index.write_text(json.dumps(columns), "utf-8")
    return Shard(target.name, part, len(columns["names"]), target.stat().st_size, file_digest(target), file_digest(index)), items


def _read(images: Images, item: int) -> bytes:
    assert images.paths is not None
    try:
        data = images.paths[item].read_bytes()
    except OSError as error:
        raise WorkError(f"{shown(images.names[item])} cannot be read ({error.strerror}): restore it, or remove it and run again") from error
    if len(data) > MAX_IMAGE or digest(data) != images.digests[item]:
        raise WorkError(f"images must stay as they are and below {MAX_IMAGE >> 20} MiB; {shown(images.names[item])} does not: run again without it")
    return data


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member, the same bytes for the same content whoever writes it, and returns where its data begin."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    start = tar.offset + BLOCK
    tar.addfile(info, io.BytesIO(data))
    return start


def _suffix(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ".img"


def from_shards(source: str, progress: Progress) -> Images:
    """The images of a folder of shards, or of an https address that ends in shards.json. No image is read.

    Raises CallError for an address that is no https, WorkError for an index that is damaged or cannot be had.
    """
    remote = urlsplit(source).scheme in ("http", "https")
    text = read_url(source) if remote else (Path(source) / INDEX).read_bytes()
    held, shards = _index(text, source)
    where: Folder | Cache = Cache(urljoin(source, "."), _kept(shards)) if remote else Folder(Path(source))
    names, digests, rows = list[str](), list[str](), list[Indices]()
    for done, shard in enumerate(shards, 1):
        table = _table(where, shard, len(held["classes"]))
        names += table["names"]
        digests += table["digests"]
        rows.append(np.array([table[column] for column in NUMBERS], dtype=np.int64))
        progress("reading", done, len(shards))
    labels, offsets, lengths, widths, heights = np.concatenate(rows, axis=1)
    shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), [shard.images for shard in shards])
    return Images(
        name=held["name"],
        classes=tuple(held["classes"]),
        labels=labels,
        names=names,
        digests=digests,
        sizes=np.stack([widths, heights], axis=1).astype(np.int32),
        channels=held["channels"],
        declared=[shard.part for shard in shards for _ in range(shard.images)],
        paths=Members(shards, shard_of, offsets, lengths, digests, where),
        source=source,
        upright=held["upright"],
        shards=shard_of,
    )


def _kept(shards: tuple[Shard, ...]) -> int:
    """How many shards a cache must hold so that an epoch fetches each once: the most that lie under the buffers of all lanes."""
    images = np.sort([shard.images for shard in shards if shard.part == "train"])
    under_one = int(np.searchsorted(np.cumsum(images), BUFFER)) + 1
    return min(len(shards), LANES * (under_one + 2))


def _index(text: bytes, source: str) -> tuple[dict[str, Any], tuple[Shard, ...]]:
    damaged = WorkError(f"{shown(source)} is no index that `reslab shard` wrote, or it is damaged")
    try:
        held = json.loads(text)
        shards = tuple(Shard(**row) for row in held["shards"])
        classes = held["classes"]
        sound = (
            held["format"] == FORMAT and held["channels"] in (1, 3) and type(held["upright"]) is bool and type(held["name"]) is str
            and type(classes) is list and all(type(name) is str for name in classes) and len(set(classes)) == len(classes) > 0
            and len(shards) > 0 and len({shard.name for shard in shards}) == len(shards) and all(map(_sound, shards))
            and sum(shard.images for shard in shards) <= MAX_IMAGES
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged from error
    if not sound:
        raise damaged
    return held, shards


def _sound(shard: Shard) -> bool:
    return (
        re.fullmatch(r"\w[\w-]{0,99}\.tar", str(shard.name), re.ASCII) is not None and shard.part in SPLITS
        and type(shard.images) is int and 0 < shard.images <= MAX_IMAGES and type(shard.bytes) is int and 0 < shard.bytes < 1 << 40
        and all(type(sum_) is str and re.fullmatch(r"[0-9a-f]{64}", sum_) for sum_ in (shard.sha256, shard.index_sha256))
    )  # fmt: skip


def _table(where: Folder | Cache, shard: Shard, classes: int) -> dict[str, list[Any]]:
    """A shard's index, every number of it within bounds. Raises WorkError."""
    name = Path(shard.name).with_suffix(".json").name
    most = INDEX_BASE + shard.images * INDEX_ROW
    damaged = WorkError(f"{shown(shard.name)} and its index must be those that shards.json names; they are not: write or fetch the shards again")
    try:
        if isinstance(where, Folder):
            if (where.path / name).stat().st_size > most:
                raise damaged
            if (where.path / shard.name).stat().st_size != shard.bytes or file_digest(where.path / name) != shard.index_sha256:
                raise damaged
            text = (where.path / name).read_bytes()
        else:
            text = where.fetched(name, shard.index_sha256, most=most).read_bytes()
        table: dict[str, list[Any]] = json.loads(text)
        rows = [table[column] for column in COLUMNS]
        if not all(type(row) is list and len(row) == shard.images for row in rows):
            raise damaged
        good = (
            all(type(name) is str for name in table["names"]) and all(type(d) is str and re.fullmatch(r"[0-9a-f]{32}", d) for d in table["digests"])
            and all(type(n) is int and 0 <= n < classes for n in table["labels"]) and all(type(n) is int and 0 < n <= MAX_IMAGE for n in table["bytes"])
            and all(type(n) is int and 0 <= n <= shard.bytes - size for n, size in zip(table["offsets"], table["bytes"], strict=True))
            and all(type(n) is int and 0 < n < 1 << 31 for n in table["widths"] + table["heights"])
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged from error
    if not good:
        raise damaged
    return table


def shuffled(shards: NDArray[np.int32], batch_size: int, rng: np.random.Generator) -> Indices:
    """An order of images whose shards are given that mixes them and yet reads few shards at a time.

    Shards are shuffled, and dealt to 8 lanes; a lane shuffles 2048 images at a time, across shards. Each batch takes an eighth
    from each lane, one after the other, so that of 2, 4 or 8 processes that share batches out each reads shards of its own, but
    for those at a lane's ends.
    """
    place = rng.permutation(int(shards.max(initial=0)) + 1)[shards]
    order = np.lexsort((rng.random(len(shards)), place))
    lane_of = np.arange(len(shards)) % batch_size * LANES // batch_size
    end = 0
    for count in np.bincount(lane_of):
        start, end = end, end + int(count)
        for first in range(start, end, BUFFER):
            rng.shuffle(order[first : min(first + BUFFER, end)])
    mixed = np.empty_like(order)
    mixed[np.argsort(lane_of, kind="stable")] = order
    return mixed
