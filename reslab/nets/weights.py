"""The one place that knows how others name and store the weights of residual networks.

Foreign files are read as if an attacker wrote them: safetensors, or a torch file under `weights_only=True`, which
builds tensors and plain containers and runs nothing.
"""

import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from reslab.errors import CallError, WorkError, shown

WRAPPERS = ("state_dict", "model", "net", "model_state_dict")


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` recognised, and whether the head was left as it was because the classes differ in number."""

    dialect: str
    tensors: int
    head_replaced: str = ""

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {self.dialect} names" + (f"; {self.head_replaced}" if self.head_replaced else "")


def load_weights(net: nn.Module, file: str | Path) -> Loaded:
    """Copies the weights in `file` (torch or safetensors; torchvision, akamaster or our own names) into `net`, strictly.

    Every tensor must be there with its shape, and none may be left over. One exception: a head for another number of
    classes is not loaded, the net keeps its own, and the result says so.
    Raises CallError when the file is missing or holds another net's weights, WorkError when it cannot be read. The net
    is unchanged after an error.
    """
    file = Path(file)
    found, dialect = recognise(read_tensors(file))
    wanted = net.state_dict()
    head_replaced = ""
    if "fc.weight" in found and "fc.weight" in wanted and found["fc.weight"].shape[1:] == wanted["fc.weight"].shape[1:]:
        theirs, ours = len(found["fc.weight"]), len(wanted["fc.weight"])
        if theirs != ours:
            found |= {"fc.weight": wanted["fc.weight"], "fc.bias": wanted["fc.bias"]}
            head_replaced = f"head replaced: the file has {theirs} classes, this net {ours}"
    for name, tensor in wanted.items():  # files from before torch 0.4.1 lack these counters
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, torch.zeros_like(tensor))
    _check_match(file, found, wanted, dialect)
    net.load_state_dict(found)
    return Loaded(dialect, len(found), head_replaced)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch or safetensors file, by name, wrappers such as `state_dict` and `module.` taken off."""
    if not file.is_file():
        raise CallError(f"weights must be a file; {shown(file)} is not one: give the path of a .safetensors, .pth or .th file")
    held: Any
    start = b""
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
        if start[8:9] == b"{":  # eight bytes of header length, then JSON
            held = safetensors.torch.load_file(file)
        else:
            with warnings.catch_warnings():  # about odd pickles, which are refused anyway
                warnings.simplefilter("ignore")
                held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a forged pickle stream can raise anything
        raise WorkError(_unreadable(file, start, error)) from error
    for wrapper in WRAPPERS:
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
            break
    if not isinstance(held, dict) or not held or not all(isinstance(v, Tensor) for v in held.values()):
        raise WorkError(f"a weights file holds named tensors; {shown(file)} holds {type(held).__name__}: save net.state_dict()")
    return {re.sub(r"^(module\.|_orig_mod\.|model\.)+", "", str(name)): tensor for name, tensor in held.items()}


def stem_of(file: str | Path) -> tuple[int, int]:
    """The input channels and the kernel size of the first convolution in a weights file. Raises as `load_weights` does."""
    found, _ = recognise(read_tensors(Path(file)))
    first = found.get("conv1.weight")
    if first is None or first.ndim != 4 or first.shape[1] not in (1, 3) or first.shape[2] not in (3, 7):
        raise CallError(f"the first convolution must be a conv1.weight of 3 or 7 px for 1 or 3 channels; {shown(file)} has none: give a residual net's weights")
    return first.shape[1], first.shape[2]


def recognise(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors under our names, and whose names they were."""
    if "linear.weight" in tensors:
        renames = {"linear.": "fc.", ".shortcut.": ".downsample."}
        renamed = {}
        for name, tensor in tensors.items():
            for theirs, ours in renames.items():
                name = name.replace(theirs, ours)
            renamed[name] = tensor
        return renamed, "akamaster"
    return dict(tensors), "torchvision"


def _check_match(file: Path, found: dict[str, Tensor], wanted: dict[str, Tensor], dialect: str) -> None:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    shapes = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if missing or extra:
        first = [f"first {what} {shown(names[0])}" for what, names in (("missing", missing), ("unexpected", extra)) if names]
        raise CallError(f"{shown(file)} ({dialect} names) holds another net's weights: {', '.join(first)}; choose the net it was made with")
    if shapes:
        name = shapes[0]
        raise CallError(
            f"{shown(file)} ({dialect} names) holds another net's weights: {name} is {tuple(found[name].shape)}, "
            f"this net needs {tuple(wanted[name].shape)}; choose the net it was made with"
        )
    for name in wanted:
        if found[name].is_floating_point() != wanted[name].is_floating_point():
            raise WorkError(f"{shown(file)}: {name} has dtype {found[name].dtype}, the net needs {wanted[name].dtype}")
        if found[name].is_floating_point() and not torch.isfinite(found[name]).all():
            raise WorkError(f"{shown(file)}: {name} holds values that are not finite; get the file again")


def _unreadable(file: Path, start: bytes, error: Exception) -> str:
    if start.lstrip()[:1] == b"<":
        return f"{shown(file)} is a web page, not weights: download the file itself"
    if isinstance(error, pickle.UnpicklingError):
        return f"{shown(file)} is not a plain weights file, and reading more could run code in it: ask for .safetensors"
    return f"{shown(file)} cannot be read as weights (is it whole?): {shown(str(error).splitlines()[0] if str(error) else repr(error))[:120]}"
