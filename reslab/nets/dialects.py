"""How others name the tensors of a residual network. A dialect is a row, and both directions are read from it.

A template names modules: `{s}`, `{b}`, `{n}` and `{i}` are numbers, the same on both sides, and `{s-1}` counts from zero
what the other side counts from one. A module that no template names is called the same by both.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from reslab.errors import CallError, shown, unknown
from reslab.spec import Spec

HEAD = "fc.weight"


class Dialect(NamedTuple):
    """Whose names, the tensor name (a regular expression) that gives them away, and what such names can say."""

    name: str
    mark: str
    renames: tuple[tuple[str, str], ...] = ()  # (theirs, ours)
    can: dict[str, tuple[Any, ...]] = {}  # noqa: RUF012  # Spec field: the values that exist there; fields not named may be anything
    conv_head: bool = False  # the head is a 1x1 convolution


_RESNET: dict[str, tuple[Any, ...]] = {
    "block": ("basic", "bottleneck"),
    "order": ("original",),
    "carry": ("identity", "dropout"),  # dropout has no weights, and does nothing after training
    "stem": ("conv7-pool",),
    "shortcut": ("B",),
    "stride": ("v1.5",),
    "norm": ("batch",),
    "bias": ("auto",),
    "squeeze": (0,),
    "antialias": (False,),
    "flatten": (0,),
    "eps": (1e-5,),
}
_IMAGENET = {**_RESNET, "widths": ((64, 128, 256, 512),), "stem_width": (0, 64)}
_HF_BLOCK = "resnet.encoder.stages.{s-1}.layers.{b}"
_TIMM_BLOCK = "stages.{s-1}.blocks.{b}"

# In the order in which they are tried.
DIALECTS = (
    Dialect(
        "huggingface",
        r"resnet\.embedder\.embedder\.convolution\.weight",
        (
            ("resnet.embedder.embedder.convolution", "conv1"),
            ("resnet.embedder.embedder.normalization", "bn1"),
            (f"{_HF_BLOCK}.layer.{{n-1}}.convolution", "layer{s}.{b}.conv{n}"),
            (f"{_HF_BLOCK}.layer.{{n-1}}.normalization", "layer{s}.{b}.bn{n}"),
            (f"{_HF_BLOCK}.shortcut.convolution", "layer{s}.{b}.downsample.0"),
            (f"{_HF_BLOCK}.shortcut.normalization", "layer{s}.{b}.downsample.1"),
            ("classifier.1", "fc"),
        ),
        {**_RESNET, "stride": ("v1.5", "v1"), "groups": (1,), "inner": (1,)},
    ),
    Dialect(
        "timm",  # its resnetv2
        r"stem\.conv\.weight",
        (
            ("stem.conv", "conv1"),
            (f"{_TIMM_BLOCK}.norm{{n}}", "layer{s}.{b}.bn{n}"),
            (f"{_TIMM_BLOCK}.conv{{n}}", "layer{s}.{b}.conv{n}"),
            (f"{_TIMM_BLOCK}.downsample.conv", "layer{s}.{b}.downsample.0"),
            ("norm", "bn_last"),
            ("head.fc", "fc"),
        ),
        {**_IMAGENET, "block": ("bottleneck",), "order": ("preact",), "stem": ("raw7-pool",), "groups": (1,), "inner": (1,)},
        conv_head=True,
    ),
    Dialect(
        "akamaster",
        r"linear\.weight",
        (("linear", "fc"), ("layer{s}.{b}.shortcut.{i}", "layer{s}.{b}.downsample.{i}")),
        {**_RESNET, "block": ("basic",), "stem": ("conv3",), "shortcut": ("A", "B"), "widths": ((16, 32, 64),), "stem_width": (0, 16)},
    ),
    Dialect("ours", r"bn_last\..*|fc1\..*|pre_fc\..*|layer\d+\.\d+\.(gate\.0|scale|halve|pre\d|downsample)\.(weight|bias)"),
    Dialect(
        "timm",
        r"conv1\.0\.weight|layer\d+\.\d+\.(se\.fc1|downsample\.2)\.weight",
        can={
            **_IMAGENET,
            "stem": ("conv7-pool", "deep-pool", "deep-conv"),
            "shortcut": ("B", "D"),
            "norm": ("batch", "group"),
            "squeeze": (0, 4, 16),
            "antialias": (False, True),
        },
    ),
    Dialect("torchvision", r"conv1\.weight", can=_IMAGENET),
)
UNKNOWN = Dialect("unknown", "")


def recognise(names: Iterable[str]) -> Dialect:
    """The dialect of a file, by the names in it."""
    names = list(names)
    return next((dialect for dialect in DIALECTS if any(re.fullmatch(dialect.mark, name) for name in names)), UNKNOWN)


def for_saving(name: str, spec: Spec) -> Dialect:
    """The dialect of that name, which must be able to say what the net is; CallError says what stands in the way."""
    rows = [dialect for dialect in DIALECTS if dialect.name == name]
    if not rows:
        raise unknown("dialect", name, dict.fromkeys(dialect.name for dialect in DIALECTS))
    obstacles = [_obstacle(dialect, spec) for dialect in rows]
    if None in obstacles:
        return rows[obstacles.index(None)]
    raise CallError(f"{name} names must be able to say what the net is; {min((o for o in obstacles if o), key=len)}: save it with dialect 'ours'")


def _obstacle(dialect: Dialect, spec: Spec) -> str | None:
    wrong = [f for f, values in dialect.can.items() if getattr(spec, f) not in values]
    return f"it has {', '.join(f'{f} {getattr(spec, f)}' for f in wrong)}, which they have not" if wrong else None


def ours(dialect: Dialect, name: str) -> str:
    """Our name of a tensor that the dialect calls `name`."""
    return _renamed(name, tuple(dialect.renames))


def theirs(dialect: Dialect, name: str) -> str:
    """The dialect's name of a tensor that we call `name`."""
    return _renamed(name, tuple((b, a) for a, b in dialect.renames))


def to_ours(dialect: Dialect, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names. Raises CallError when two of them would have one name."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = ours(dialect, name)
        if own in found:
            raise CallError(f"a weights file must hold each tensor once; this one ({dialect.name} names) has {shown(own)} twice, also as {shown(name)}")
        found[own] = tensor
    head = found.get(HEAD)
    if dialect.conv_head and head is not None and head.shape[2:] == (1, 1):
        found[HEAD] = head[:, :, 0, 0]
    return found


def from_ours(dialect: Dialect, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    return {theirs(dialect, name): tensor[:, :, None, None] if dialect.conv_head and name == HEAD else tensor for name, tensor in tensors.items()}


_HOLE = re.compile(r"\{(\w)(-1)?\}")


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    module, _, tensor = name.rpartition(".")
    for source, target in renames:
        if match := _pattern(source).fullmatch(module):
            numbers = {hole: int(match[hole]) + bool(less) for hole, less in _HOLE.findall(source)}
            return _HOLE.sub(lambda hole, n=numbers: str(n[hole[1]] - bool(hole[2])), target) + f".{tensor}"  # type: ignore[misc]
    return name


@cache
def _pattern(template: str) -> re.Pattern[str]:
    texts, holes = _HOLE.split(template)[::3], _HOLE.findall(template)
    parts = [f"(?P<{hole}>[0-9]{{1,4}})" for hole, _ in holes]
    return re.compile("".join(re.escape(text) + part for text, part in zip(texts, [*parts, ""], strict=True)))
