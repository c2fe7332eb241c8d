"""Foreign weights files, read as if an attacker wrote them, and recognised by content: never by the file's name.

A torch file is read under `weights_only=True`, which builds tensors and plain containers and runs nothing; twice, first
without its data, so that what claims more than the file holds is refused before memory is taken for it.
"""

import io
import json
import mmap
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from reslab.errors import CallError, WorkError, shown
from reslab.nets.keras_files import is_keras, read_h5

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")  # preferred: what their authors publish and score
WRAPPERS = (*AVERAGED, "model_state_dict", "state_dict", "model", "net")
PREFIXES = re.compile(r"^(module\.|_orig_mod\.|model\.|net\.)+|(?<=\.)_orig_mod\.")
ZIP = b"PK\x03\x04"
LEGACY = 5  # pickles that a torch file begins with which is no zip
MAX_CONFIG = 1 << 20  # bytes of a config.json


class Held(NamedTuple):
    """What a file holds. `keras` tensors have our names already; `averaged` is the wrapper an average was found in."""

    tensors: dict[str, Tensor]
    averaged: str = ""
    keras: bool = False


def read_tensors(file: Path) -> Held:
    """The tensors of a torch, safetensors or Keras file, wrappers such as `state_dict` and `module.` taken off.

    Raises CallError when there is no file, WorkError, in one line, for anything but named dense tensors.
    """
    if not os.path.isfile(file):  # noqa: PTH113  # a path that is too long, or may not be looked at, is said to be none
        raise CallError(f"weights must be a file; {shown(file)} is not one: give the path of a .safetensors, .pth, .th, .h5 or .keras file")
    start = b""
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
        if is_keras(file):
            return Held(read_h5(file), keras=True)
        # safetensors begin with eight bytes of header length, then JSON
        held: Any = safetensors.torch.load_file(file) if start[8:9] == b"{" else _read_torch(file, start)
    except WorkError:
        raise
    except Exception as error:  # a forged pickle stream can raise anything
        raise WorkError(_unreadable(file, start, error)) from error
    held, averaged = _unwrapped(held)
    if not isinstance(held, dict) or not held or not all(isinstance(v, Tensor) for v in held.values()):
        raise WorkError(f"a weights file holds named tensors; {shown(file)} holds {type(held).__name__}: save net.state_dict()")
    for name, tensor in held.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
            raise WorkError(f"a weights file holds dense tensors; {shown(str(name))} in {shown(file)} is not one: save net.state_dict() of a float net")
    return Held(_plain_names(file, held), averaged)


def read_config(file: Path) -> dict[str, Any]:
    """The config.json that lies beside a model.safetensors or pytorch_model.bin, if there is one, as a dict."""
    config = file.with_name("config.json")
    if file.stem not in ("model", "pytorch_model") or not config.is_file():
        return {}
    try:
        if config.stat().st_size > MAX_CONFIG:
            raise ValueError(f"it has over {MAX_CONFIG} bytes")
        held = json.loads(config.read_text("utf-8"))
        if not isinstance(held, dict):
            raise ValueError(f"it holds a {type(held).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise WorkError(f"a config.json beside weights must be a JSON object; {shown(config)} is not: {shown(str(error))[:120]}") from error
    return held


def _read_torch(file: Path, start: bytes) -> Any:
    """The file's content; tensors of a zip file are views of the mapped file."""
    size, is_zip = file.stat().st_size, start[:4] == ZIP
    if size:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"bytearray") >= 0:  # `weights_only` makes one of any size
                raise WorkError(f"{shown(file)} holds a bytearray, which a weights file has no use for: ask for .safetensors")
            for _ in range(0 if is_zip else LEGACY):
                _check_tuples(file, content, size)
    if is_zip:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            claimed = sum(entry.file_size for entry in entries)
            if claimed > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise WorkError(
                    f"a weights file must hold its tensors as they are; {shown(file)} has {size} bytes and unpacks to {claimed}: ask for .safetensors"
                )
            for entry in entries:
                if entry.filename.lower().endswith("data.pkl"):  # torch finds it in capitals, too
                    _check_tuples(file, io.BytesIO(archive.read(entry)), size)
    with warnings.catch_warnings():  # about odd pickles, which are refused anyway
        warnings.simplefilter("ignore")
        with torch.serialization.skip_data():
            described = torch.load(file, map_location="meta", weights_only=True)
        for tensor in _tensors_in(described):
            if tensor.layout == torch.strided and (needed := tensor.untyped_storage().nbytes()) > size:
                raise WorkError(f"{shown(file)} has {size} bytes and claims a tensor of {needed}: get the file again, or ask for .safetensors")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)


def _check_tuples(file: Path, content: io.BytesIO | mmap.mmap, size: int) -> None:
    """Reads a pickle up to its end, and builds nothing. Raises WorkError for tuples with more inside than the file has bytes, its `size`.

    A tuple can hold another twice, which holds a third twice, and so on; and to make a key of one takes all that is inside, each time.
    So it is followed over the stack how much is inside of each value, and added up for tuples, and for what is taken up once more.
    """
    stack: list[int] = []
    marks: list[int] = []  # how high the stack was
    memo: dict[Any, int] = {}
    inside = 0
    for code, argument, _ in pickletools.genops(content) if content.tell() < size else ():  # type: ignore[arg-type]
        name, before = code.name, code.stack_before
        if name == "MARK":
            marks.append(len(stack))
        elif name.endswith("PUT") or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        else:
            start = marks.pop() - before.index(pickletools.markobject) if pickletools.markobject in before else len(stack) - len(before)
            value = memo[argument] if name.endswith("GET") else min(1 + sum(stack[start:]), size + 1)
            del stack[start:]
            stack += [value] * len(code.stack_after)
            inside += value if "TUPLE" in name or name.endswith("GET") else 0
            if inside > size:
                raise WorkError(f"{shown(file)} holds tuples in tuples that have more inside than the file, as no weights file does: ask for .safetensors")


def _tensors_in(held: Any) -> list[Tensor]:
    """Every tensor in nested containers. Each container is entered once: a forged one can hold itself, or one many times."""
    found, waiting, seen = [], [held], {id(held)}
    while waiting:
        here = waiting.pop()
        if isinstance(here, Tensor):
            found.append(here)
        inner = here.values() if isinstance(here, dict) else here if isinstance(here, list | tuple | set) else ()
        fresh = {id(item): item for item in inner if id(item) not in seen}
        seen |= fresh.keys()
        waiting += fresh.values()
    return found


def _unwrapped(held: Any) -> tuple[Any, str]:
    """What is inside of wrappers, and the name of the one that says it is an average."""
    averaged = ""
    for _ in range(3):
        inner = next((w for w in WRAPPERS if isinstance(held, dict) and isinstance(held.get(w), dict) and held[w]), None)
        if inner is None:
            break
        held, averaged = held[inner], inner if inner in AVERAGED else averaged
    return held, averaged


def _plain_names(file: Path, held: dict[Any, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in held.items():
        plain = PREFIXES.sub("", str(name))
        if plain in tensors:
            raise WorkError(f"a weights file must hold each tensor once; {shown(file)} has {shown(plain)} twice, also as {shown(str(name))}")
        if plain != "n_averaged":  # the counter of torch.optim.swa_utils.AveragedModel
            tensors[plain] = tensor
    return tensors


def _unreadable(file: Path, start: bytes, error: Exception) -> str:
    if start.lstrip()[:1] == b"<" and start[8:9] != b"{":  # which a header's length can begin with, too
        return f"{shown(file)} is a web page, not weights: download the file itself"
    if isinstance(error, pickle.UnpicklingError):
        return f"{shown(file)} is not a plain weights file, and reading more could run code in it: ask for .safetensors"
    return f"{shown(file)} cannot be read as weights (is it whole?): {shown(str(error).splitlines()[0] if str(error) else repr(error))[:120]}"
