"""Keras's weights files, read without Keras: `.keras`, `.weights.h5`, and the old `.h5` in which Keras Applications come.

They are read as if an attacker wrote them. Only plain stored arrays are read, which a file can hold no more of than its own
size: nothing compressed, sparse, virtual, linked or kept elsewhere. No configuration is executed; it only names the layers.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reslab.errors import WorkError, needs_extra, shown
from reslab.nets.keras_weights import SUFFIX, to_tensor, torch_names

if TYPE_CHECKING:
    from torch import Tensor

HDF5 = b"\x89HDF\r\n\x1a\n"
ZIP = b"PK\x03\x04"
WEIGHTS, CONFIG = "model.weights.h5", "config.json"  # members of a .keras file
MOST_CONFIG = 16 << 20  # bytes
MOST_MEMBERS = 1 << 15  # ResNet-1202 in an old .h5 has 12,622
MOST_DEPTH = 8  # of groups in an old .h5: model_weights, layer, scopes, variable

# What Keras 3 calls a layer's group (its class, then _1, _2 and so on) and what the layer saves, in this order
CLASSES = {
    "Conv2D": "conv2d",
    "Dense": "dense",
    "BatchNormalization": "batch_normalization",
    "GroupNormalization": "group_normalization",
    "Shift": "shift",
    "ScaleShift": "scale_shift",
    "Scale": "scale",
}
VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "group_normalization": ("gamma", "beta"),
    "shift": ("bias",),
    "scale_shift": ("weight", "bias"),
    "scale": ("weight",),
}


class _Refused(Exception):
    """The file holds what no weights file of Keras holds."""


def is_keras(file: Path) -> bool:
    """Whether a file's content is one of Keras's: HDF5, or a zip with an HDF5 of weights in it (torch's are zips too)."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(HDF5))
        if start.startswith(ZIP):
            with zipfile.ZipFile(file) as archive:
                return WEIGHTS in archive.namelist()
        return start == HDF5
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def read_h5(path: Path) -> "dict[str, Tensor]":
    """The tensors of a `.keras` or HDF5 weights file of Keras, by our torch names and in torch's order of axes.

    Float32, or float64 where the file has it. Layers with names that no net of ours has keep them. Raises WorkError when
    the file cannot be read, or holds what a weights file of Keras does not.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise needs_extra("h5py", "keras") from error
    try:
        source, size, names = _unpacked(path)
        with h5py.File(source, "r") as file:
            layers = dict(_Reader(h5py, size).layers(file, names))
    except Exception as error:  # a forged HDF5 can raise anything
        why = str(error).splitlines()[0] if str(error) else repr(error)
        raise WorkError(f"{shown(path)} cannot be read as weights of Keras (is it whole?): {shown(why)[:120]}") from error
    ours = torch_names(layers)
    found: dict[str, Tensor] = {}
    for name, held in layers.items():
        for variable, tensor in held.items():
            own = f"{ours[name]}.{SUFFIX[variable]}"
            if own in found:
                raise WorkError(f"a weights file must hold each tensor once; {shown(path)} has {shown(own)} twice, also as {shown(name)}")
            found[own] = tensor
    return found


def _unpacked(path: Path) -> tuple[Any, int, dict[str, str]]:
    """The HDF5 file, its size, and the layer names that a .keras file's config gives its groups."""
    with path.open("rb") as stream:
        if not stream.read(len(ZIP)).startswith(ZIP):
            return path, path.stat().st_size, {}
    with zipfile.ZipFile(path) as archive:
        config, weights = archive.getinfo(CONFIG), archive.getinfo(WEIGHTS)
        stored = config.compress_type == weights.compress_type == zipfile.ZIP_STORED
        if not stored or config.file_size > MOST_CONFIG or weights.file_size > path.stat().st_size:
            raise _Refused(f"{WEIGHTS} and {CONFIG} must be stored as they are, as Keras does, and {CONFIG} have at most {MOST_CONFIG >> 20} MiB")
        return io.BytesIO(archive.read(weights)), weights.file_size, _configured(archive.read(config))


def _configured(config: bytes) -> dict[str, str]:
    """The layers' names by their groups: Keras counts the layers of each class in the model's order."""
    counts: dict[str, int] = {}
    names: dict[str, str] = {}
    try:
        for layer in json.loads(config)["config"]["layers"]:
            kind = CLASSES.get(str(layer["class_name"]).rpartition(">")[2])
            if kind:
                number = counts[kind] = counts.get(kind, -1) + 1
                names[f"{kind}_{number}" if number else kind] = str(layer["config"]["name"])
    except (LookupError, TypeError, RecursionError) as error:
        raise _Refused(f"{CONFIG} must list the model's layers") from error
    return names


class _Reader:
    """Takes plain arrays out of an open HDF5 file, no more bytes than `size`, which is the file's own."""

    def __init__(self, h5py: Any, size: int) -> None:
        self.h5py = h5py
        self.bytes_left, self.members_left = size, MOST_MEMBERS

    def member(self, group: Any, name: str) -> Any:
        """What a group holds under a name, where it is not a link to elsewhere."""
        self.members_left -= 1
        if self.members_left < 0:
            raise _Refused(f"it must hold at most {MOST_MEMBERS} groups and arrays")
        if not isinstance(group, self.h5py.Group) or not isinstance(group.get(name, getlink=True), self.h5py.HardLink):
            raise _Refused(f"{name} must lie in the file itself, links are not followed")
        return group[name]

    def tensor(self, array: Any) -> "Tensor":
        if not isinstance(array, self.h5py.Dataset):
            raise _Refused(f"{array.name} must be an array")
        self.bytes_left -= array.nbytes
        plain = array.chunks is None and not array.is_virtual and not array.external and array.dtype.kind == "f" and array.dtype.itemsize <= 8
        if self.bytes_left < 0 or not plain or array.id.get_storage_size() != array.nbytes:
            raise _Refused(f"{array.name} must be a plain array of floats that lies in the file")
        return to_tensor(array[...])

    def layers(self, file: Any, names: dict[str, str]) -> Iterator[tuple[str, "dict[str, Tensor]"]]:
        """Each layer's name and its variables."""
        if "layers" in file:
            root = self.member(file, "layers")
            for group in root:
                kind = re.sub(r"_\d+$", "", group)
                if kind in VARIABLES:
                    yield self.layer(self.member(root, group), kind, names.get(group, "") if names else None)
            return
        root = self.member(file, "model_weights") if "model_weights" in file else file
        for group in root:
            held = {name: self.tensor(array) for name, array in self.arrays(self.member(root, group)) if name in SUFFIX}
            if held:
                yield group, held

    def layer(self, group: Any, kind: str, name: str | None) -> tuple[str, "dict[str, Tensor]"]:
        """Of Keras 3: arrays called 0, 1 and so on. Newer ones say the layer's name there too."""
        held, order = self.member(group, "vars"), VARIABLES[kind]
        if name is None:
            name = held.attrs.get("name")
        if not isinstance(name, str) or not name:
            raise _Refused(f"{group.name} has no layer's name: save the whole model, as .keras")
        if not 0 < len(held) <= len(order):
            raise _Refused(f"{group.name} has {len(held)} variables, its class at most {len(order)}")
        return name, {order[i]: self.tensor(self.member(held, str(i))) for i in range(len(held))}

    def arrays(self, group: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
        """Of an old file: every array below a layer's group, by its last name; conv1_conv/kernel:0 is the kernel."""
        if depth > MOST_DEPTH:
            raise _Refused(f"its groups are more than {MOST_DEPTH} deep")
        for name in group:
            member = self.member(group, name)
            if isinstance(member, self.h5py.Group):
                yield from self.arrays(member, depth + 1)
            else:
                yield name.removesuffix(":0"), member
