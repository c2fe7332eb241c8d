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
MOST_CONFIG = 64 << 20  # bytes; ResNet-1202's takes a tenth of it
MOST_LAYERS = 1 << 16
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
            layers = dict(_layers(h5py, file, size, names))
    except Exception as error:  # a forged HDF5 can raise anything
        why = str(error).splitlines()[0] if str(error) else repr(error)
        raise WorkError(f"{shown(path)} cannot be read as weights of Keras (is it whole?): {shown(why)[:120]}") from error
    ours = torch_names(layers)
    return {f"{ours[name]}.{SUFFIX[variable]}": tensor for name, held in layers.items() for variable, tensor in held.items()}


def _unpacked(path: Path) -> tuple[Any, int, dict[str, str]]:
    """The HDF5 file, its size, and the layer names that a .keras file's config gives its groups."""
    with path.open("rb") as stream:
        if not stream.read(len(ZIP)).startswith(ZIP):
            return path, path.stat().st_size, {}
    with zipfile.ZipFile(path) as archive:
        config, weights = archive.getinfo(CONFIG), archive.getinfo(WEIGHTS)
        if config.file_size > MOST_CONFIG or weights.compress_type != zipfile.ZIP_STORED or weights.file_size > path.stat().st_size:
            raise _Refused(f"{WEIGHTS} must be stored as it is, as Keras does, and {CONFIG} have at most {MOST_CONFIG >> 20} MiB")
        return io.BytesIO(archive.read(weights)), weights.file_size, _configured(archive.read(config))


def _configured(config: bytes) -> dict[str, str]:
    """The layers' names by their groups: Keras counts the layers of each class in the model's order."""
    counts: dict[str, int] = {}
    names: dict[str, str] = {}
    for layer in json.loads(config)["config"]["layers"]:
        kind = CLASSES.get(str(layer["class_name"]).rpartition(">")[2])
        if kind:
            number = counts[kind] = counts.get(kind, -1) + 1
            names[f"{kind}_{number}" if number else kind] = str(layer["config"]["name"])
    return names


def _layers(h5py: Any, file: Any, size: int, names: dict[str, str]) -> Iterator[tuple[str, "dict[str, Tensor]"]]:
    """Each layer's name and its variables. `size`: no more bytes than the file has can be in it."""
    left = size

    def tensor(dataset: Any) -> "Tensor":
        nonlocal left
        left -= dataset.nbytes
        plain = dataset.chunks is None and not dataset.is_virtual and not dataset.external and dataset.dtype.kind == "f" and dataset.dtype.itemsize <= 8
        if left < 0 or not plain or dataset.id.get_storage_size() != dataset.nbytes:
            raise _Refused(f"{dataset.name} must be a plain array of floats that lies in the file")
        return to_tensor(dataset[...])

    new = "layers" in file
    root = _member(h5py, file, "layers" if new else "model_weights") if new or "model_weights" in file else file
    if len(root) > MOST_LAYERS:
        raise _Refused(f"it has {len(root)} layers")
    for group in root:
        if group == "optimizer_weights":
            continue
        held = _member(h5py, root, group)
        if not new:
            found = {name: tensor(dataset) for name, dataset in _datasets(h5py, held) if name in SUFFIX}
            if found:
                yield group, found
        elif re.sub(r"_\d+$", "", group) in VARIABLES:
            variables = _member(h5py, held, "vars")
            order = VARIABLES[re.sub(r"_\d+$", "", group)]
            if not 0 < len(variables) <= len(order):
                raise _Refused(f"{group} has {len(variables)} variables, its class at most {len(order)}")
            name = names[group] if names else variables.attrs.get("name")
            if not isinstance(name, str):
                raise _Refused("its layers have no names: save the whole model, as .keras")
            yield name, {order[i]: tensor(_member(h5py, variables, str(i))) for i in range(len(variables))}


def _datasets(h5py: Any, group: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every array below a layer's group of an old file, by its last name: conv1_conv/kernel:0 is the kernel."""
    if depth > MOST_DEPTH or len(group) > MOST_LAYERS:
        raise _Refused(f"its groups are more than {MOST_DEPTH} deep, or hold too much")
    for name in group:
        member = _member(h5py, group, name)
        if isinstance(member, h5py.Group):
            yield from _datasets(h5py, member, depth + 1)
        else:
            yield name.removesuffix(":0"), member


def _member(h5py: Any, group: Any, name: str) -> Any:
    """What a group holds under a name, where it is not a link to elsewhere."""
    if not isinstance(group, h5py.Group) or not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise _Refused(f"{name} must lie in the file itself, links are not followed")
    return group[name]
