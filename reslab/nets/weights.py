"""Weights into a net: found, read, recognised, matched strictly. And what a file's weights are of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reslab.errors import CallError, WorkError, shown
from reslab.nets.configs import contradiction
from reslab.nets.dialects import HEAD, Dialect, recognise, theirs, to_ours
from reslab.nets.hub import locate
from reslab.nets.identify import COUNTER, fitting, sentence
from reslab.nets.reading import read_config, read_tensors
from reslab.nets.values import flaw

KERAS = Dialect("Keras", "")


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` recognised, whether the weights are an average, and whether the head was left as it was."""

    dialect: str
    tensors: int
    head_replaced: str = ""  # because the classes differ in number
    averaged: str = ""  # the wrapper that holds the average

    def __str__(self) -> str:
        notes = [f"the average in {self.averaged}"] * bool(self.averaged) + [self.head_replaced] * bool(self.head_replaced)
        return "; ".join([f"{self.tensors} tensors, {self.dialect} names", *notes])


class Identified(NamedTuple):
    """What the weights in a file are of. `nets` are rows of `FAMILY`; several, where weights cannot tell them apart."""

    dialect: str
    nets: tuple[str, ...]
    num_classes: int
    in_channels: int


class _Found(NamedTuple):
    path: Path
    dialect: Dialect
    tensors: dict[str, Tensor]  # under our names
    averaged: str

    @property
    def title(self) -> str:
        return f"{shown(self.path)} ({self.dialect.name} names)"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def load_weights(net: nn.Module, file: str | Path) -> Loaded:
    """Copies weights into `net`, strictly: every tensor must be there with its shape, and none may be left over.

    `file` is a torch, safetensors or Keras file, a folder with a model.safetensors, an https URL (with `#sha256=...`
    checked against it) or `hf:owner/name[@revision][/file]`. The names of torchvision, timm, Hugging Face Transformers,
    akamaster, Keras and our own are recognised by what is in the file. A config.json beside it is heard about what shapes
    cannot tell, such as where a block halves. One exception to strictness: a head for another number of classes is not
    loaded, the net keeps its own, and the result says so.

    Raises CallError when there is no file or it holds another net's weights, with the dialect, the first missing and
    the first unexpected tensor, and the nets that it would fit; WorkError when it cannot be read or fetched. The net is
    unchanged after an error.
    """
    found = _find(file)
    tensors, wanted = dict(found.tensors), net.state_dict()
    head_replaced = ""
    if HEAD in tensors and HEAD in wanted and tensors[HEAD].shape[1:] == wanted[HEAD].shape[1:] and len(tensors[HEAD]) != len(wanted[HEAD]):
        head_replaced = f"head replaced: the file has {len(tensors[HEAD])} classes, this net {len(wanted[HEAD])}"
        tensors |= {name: wanted[name] for name in (HEAD, "fc.bias") if name in tensors}
    for name, tensor in wanted.items():  # files from before torch 0.4.1 and from Keras lack these counters
        if name.endswith(COUNTER):
            tensors.setdefault(name, torch.zeros_like(tensor))
    _check_match(found, tensors, wanted)
    spec = getattr(net, "spec", None)
    if spec is not None and (against := contradiction(read_config(found.path), spec)):
        raise CallError(f"{found.title} holds another net's weights: the config.json beside it says {against}")
    _check_values(found, tensors, wanted)
    net.load_state_dict(tensors)
    return Loaded(found.dialect.name, len(tensors), head_replaced, found.averaged)


def identify(file: str | Path) -> Identified:
    """The networks of the family that the weights in a file fit, exactly; none, where they fit none.

    Raises as `load_weights` does for a file that cannot be read.
    """
    found = _find(file)
    shapes = found.shapes
    return Identified(found.dialect.name, tuple(fitting(shapes)), (shapes.get(HEAD) or (0,))[0], _stem(found)[0].shape[1])


def stem_of(file: str | Path) -> tuple[int, tuple[int, ...]]:
    """The input channels, 1 or 3, and the kernel size of each convolution of the stem. Raises as `load_weights` does."""
    found = _find(file)
    convs = _stem(found)
    if convs[0].shape[1] not in (1, 3):
        raise CallError(f"images have 1 or 3 channels; {found.title} is of a net for {convs[0].shape[1]}: give a net's weights for images")
    return convs[0].shape[1], tuple(conv.shape[2] for conv in convs)


def _stem(found: _Found) -> list[Tensor]:
    convs = [found.tensors[name] for name in ("conv1.weight", "conv1.0.weight", "conv1.3.weight", "conv1.6.weight") if name in found.tensors]
    if not convs or any(conv.ndim != 4 for conv in convs):
        raise CallError(f"the first convolution must be a conv1.weight; {found.title} has none: give a residual net's weights")
    return convs


def _find(file: str | Path) -> _Found:
    path = locate(file)
    held = read_tensors(path)
    dialect = KERAS if held.keras else recognise(held.tensors)
    return _Found(path, dialect, to_ours(dialect, held.tensors), held.averaged)


def _check_match(found: _Found, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing = [theirs(found.dialect, name) for name in wanted if name not in tensors]
    extra = [theirs(found.dialect, name) for name in sorted(tensors, key=lambda name: name.endswith(COUNTER)) if name not in wanted]
    shapes = [name for name in wanted if name in tensors and tensors[name].shape != wanted[name].shape]
    if not (missing or extra or shapes):
        return
    told = [f"first {what} {shown(names[0])}" for what, names in (("missing", missing), ("unexpected", extra)) if names]
    if not told:
        name = shapes[0]
        told = [f"{theirs(found.dialect, name)} is {tuple(tensors[name].shape)}, this net needs {tuple(wanted[name].shape)}"]
    rows = fitting(found.shapes)
    fix = f"its tensors fit {sentence(rows, len(found.tensors[HEAD]))}" if rows else "they fit no net of the family exactly: choose the net it was made with"
    raise CallError(f"{found.title} holds another net's weights: {', '.join(told)}; {fix}")


def _check_values(found: _Found, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, own in wanted.items():
        if wrong := flaw(name, tensors[name], own):
            raise WorkError(f"{found.title}: {theirs(found.dialect, name)} {wrong}; get the file again")
