"""Spec -> keras.Model: the second opinion. It reads no block: `Spec.layers` says every layer in the order it runs, and a
row of `KINDS` makes each. Images are (N, H, W, C); `identity_block` and `convolutional_block` are for those who build by hand.

A layer bears its torch module's name, with - for . (Keras's torch backend forbids the dot): `layer1-0-conv1`. So weights go
both ways by name (`keras_weights.py`); what only prepares a layer's input is called NAME-pad and the like. In training a
batch norm gives what torch's gives, but Keras moves its variance by the batch's biased one and torch by the unbiased one,
larger by n / (n - 1).
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reslab.errors import CallError, WorkError, shown
from reslab.family import spec as find_spec
from reslab.keras_backend import keras
from reslab.layout import SCALING, Layer, norm_groups, start_scales
from reslab.nets.keras_parts import AddExclusive, AddGated, BlurPool, PadShortcut, Scale, ScaleShift, Shift, Value
from reslab.nets.keras_weights import keras_name, to_keras
from reslab.run import write_whole
from reslab.spec import Size, Spec

if TYPE_CHECKING:
    from reslab.nets.torch import ResNet

MOMENTUM = 0.9  # of the old moving statistics; torch says 0.1, of the new ones

has = keras.layers


class At(NamedTuple):
    """A layer to be made, and what it needs to know of its surroundings."""

    layer: Layer
    spec: Spec
    before: str  # the kind of layer whose output it reads
    scale: float  # what its first parameters are multiplied by

    @property
    def name(self) -> str:
        return keras_name(self.layer.name)


def build(net: str | Spec, image_size: Size | None = None, **changes: Any) -> Any:
    """A plain functional `keras.Model`, initialised, from a name in `FAMILY` or a Spec; `changes` are Spec fields.

    (N, H, W, in_channels) float -> logits (N, num_classes), without softmax: compile with `from_logits=True`. Without
    `image_size` any size from the net's smallest will do, except where the last map is flattened; some exports need one.
    Random numbers come from Keras's seed (`keras.utils.set_random_seed`). Raises CallError (a ValueError) for an unknown name
    or field, a size that is too small, and a Keras that is set to channels first.
    """
    return _model(find_spec(net, **changes), image_size, net if isinstance(net, str) else "resnet")


def _model(spec: Spec, image_size: Size | None, name: str) -> Any:
    if keras.config.image_data_format() != "channels_last":
        raise CallError("images must have their channels last; Keras is set to channels_first: keras.config.set_image_data_format('channels_last')")
    size = image_size or spec.flatten or None
    height, width = size if isinstance(size, tuple) else (size, size)
    if size is not None:
        spec.check_size(size if isinstance(size, int) else min(size))
    made = {"input": keras.Input((height, width, spec.in_channels), name="image")}
    kinds, scales = {"input": "input"}, start_scales(spec)
    for layer in spec.layers(size or max(32, spec.reduction)):  # of any size that leaves every layer a pixel, channels are the same
        at = At(layer, spec, kinds[layer.inputs[0]], scales.get(layer.name, 1.0))
        made[layer.name] = KINDS[layer.kind](at, *(made[name] for name in layer.inputs))
        kinds[layer.name] = layer.kind
    with _deep():
        return keras.Model(made["input"], made["fc"], name=name)


def from_torch(net: "ResNet", image_size: Size | None = None) -> Any:
    """The `keras.Model` of a torch net's spec with its weights."""
    model = _model(net.spec, image_size, "resnet")
    to_keras(net, model)
    return model


def save(net: "ResNet", path: str | Path) -> None:
    """Writes a torch net as a `.keras` file, whole or not at all.

    Raises CallError for another suffix, WorkError when it cannot be written; what was there is kept.
    """
    path = Path(path)
    if path.suffix != ".keras":
        raise CallError(f"a Keras file ends in .keras; received {shown(path.name)}: call it {shown(path.stem)}.keras")
    model = from_torch(net)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / path.name
        try:
            model.save(whole)
        except OSError as error:
            raise WorkError(f"{shown(path)} cannot be written, {shown(folder)} has no room for it: {shown(str(error))[:120]}") from error
        write_whole(path, whole.read_bytes())


def load(path: str | Path) -> Any:
    """`keras.models.load_model`, for nets of any depth: on its own it fails beyond about a thousand layers."""
    with _deep():
        return keras.models.load_model(path)


@contextmanager
def _deep() -> Iterator[None]:
    """Keras goes through a graph recursively, a frame a layer; ResNet-1202 has thousands in a row."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 200_000))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _conv(at: At, x: Value) -> Value:
    """Padded alike on all sides; "same" would pad a stride of 2 on one side only."""
    conv = at.layer.conv
    assert conv is not None
    if conv.stride > 1 and conv.kernel > 1:
        x = has.ZeroPadding2D(conv.kernel // 2, name=f"{at.name}-pad")(x)
    made = has.Conv2D(
        conv.outputs, conv.kernel, conv.stride,
        padding="same" if conv.stride == 1 else "valid", groups=conv.groups, use_bias=at.layer.bias,
        kernel_initializer=_he(at.scale), bias_initializer=keras.initializers.Constant(at.layer.value), name=at.name,
    )  # fmt: skip
    return made(x)


def _he(scale: float) -> Any:
    """He et al. 2015 (1502.01852), equation 14, fan out, times `scale`."""
    return keras.initializers.VarianceScaling(2 * scale**2, "fan_out", "untruncated_normal") if scale else "zeros"


def _linear(at: At, x: Value) -> Value:
    """Uniform within 1 / sqrt(inputs), as torch's."""
    bound = x.shape[-1] ** -0.5
    start = [keras.initializers.RandomUniform(-bound, bound) for _ in range(2)] if at.scale else ["zeros", "zeros"]
    return has.Dense(at.layer.shape[0], kernel_initializer=start[0], bias_initializer=start[1], name=at.name)(x)


def _batchnorm(at: At, x: Value) -> Value:
    start = keras.initializers.Constant(at.scale)
    return has.BatchNormalization(momentum=MOMENTUM, epsilon=at.spec.eps, gamma_initializer=start, name=at.name)(x)


def _groupnorm(at: At, x: Value) -> Value:
    start, groups = keras.initializers.Constant(at.scale), norm_groups(at.layer.shape[0])
    return has.GroupNormalization(groups, epsilon=at.spec.eps, gamma_initializer=start, name=at.name)(x)


def _maxpool(at: At, x: Value) -> Value:
    """Keras pads with zeros; behind a ReLU they change no maximum."""
    pool = at.layer.pool
    assert pool is not None
    if pool.padding and (pool.fill == "zero" or at.before == "relu"):
        x = has.ZeroPadding2D(pool.padding, name=f"{at.name}-pad")(x)
    elif pool.ceil:
        return has.MaxPooling2D(pool.kernel, pool.stride, "same", name=at.name)(x)
    elif pool.padding:  # "same" ignores what is outside, and with stride 1 it is the same on all sides
        x = has.MaxPooling2D(pool.kernel, 1, "same", name=f"{at.name}-window")(x)
        return has.MaxPooling2D(1, pool.stride, name=at.name)(x)
    return has.MaxPooling2D(pool.kernel, pool.stride, name=at.name)(x)


def _avgpool(at: At, x: Value) -> Value:
    """An average over what there is at an odd edge."""
    pool = at.layer.pool
    assert pool is not None
    return has.AveragePooling2D(pool.kernel, pool.stride, "same", name=at.name)(x)


def _blurpool(at: At, x: Value) -> Value:
    assert at.layer.pool is not None
    return BlurPool(at.layer.pool.stride, name=at.name)(x)


def _pad(at: At, x: Value) -> Value:
    conv = at.layer.conv
    assert conv is not None
    if conv.outputs == x.shape[-1]:
        return has.MaxPooling2D(1, conv.stride, name=at.name)(x)
    return PadShortcut(conv.outputs, conv.stride, name=at.name)(x)


def _flatten(at: At, x: Value) -> Value:
    """In torch's order, channels first, so that the linear layer behind it means the same."""
    return has.Flatten(name=at.name)(has.Permute((3, 1, 2), name=f"{at.name}-order")(x))


def _add_scaled(at: At, *inputs: Value) -> Value:
    assert 1 / len(inputs) == SCALING  # so the mean is what the paper adds
    return has.Average(name=at.name)(inputs)


KINDS: dict[str, Callable[..., Value]] = {
    "conv": _conv,
    "linear": _linear,
    "batchnorm": _batchnorm,
    "groupnorm": _groupnorm,
    "relu": lambda at, x: has.ReLU(name=at.name)(x),
    "sigmoid": lambda at, x: has.Activation("sigmoid", name=at.name)(x),
    "maxpool": _maxpool,
    "avgpool": _avgpool,
    "blurpool": _blurpool,
    "globalpool": lambda at, x: has.GlobalAveragePooling2D(keepdims=at.name != "avgpool", name=at.name)(x),  # the head's is a vector
    "flatten": _flatten,
    "pad": _pad,
    "duplicate": lambda at, x: has.Concatenate(name=at.name)([x, x]),
    "dropout": lambda at, x: has.Dropout(at.layer.value, name=at.name)(x),
    "droppath": lambda at, x: has.Dropout(at.layer.value, noise_shape=(None, 1, 1, 1), name=at.name)(x),
    "shift": lambda at, x: Shift(name=at.name)(x),
    "scaleshift": lambda at, x: ScaleShift(name=at.name)(x),
    "scale": lambda at, x: Scale(name=at.name)(x),
    "multiply": lambda at, *inputs: has.Multiply(name=at.name)(inputs),
    "add": lambda at, *inputs: has.Add(name=at.name)(inputs),
    "add-scaled": _add_scaled,
    "add-exclusive": lambda at, *inputs: AddExclusive(name=at.name)(list(inputs)),
    "add-gated": lambda at, *inputs: AddGated(name=at.name)(list(inputs)),
}


def identity_block(x: Value, filters: tuple[int, int, int], kernel: int = 3, name: str | None = None) -> Value:
    """The classic teaching block: 1x1 - kernel - 1x1 with biases, each with batch norm, around an identity shortcut.

    `x` is (N, H, W, filters[2]), and so is the result. Layers are called NAME-conv1, NAME-bn1 and so on.
    """
    return _bottleneck(x, filters, kernel, 1, name, x)


def convolutional_block(x: Value, filters: tuple[int, int, int], kernel: int = 3, stride: int = 2, name: str | None = None) -> Value:
    """The same with a 1x1 convolution and batch norm on the shortcut; it and the first 1x1 have the stride (v1).

    (N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), filters[2]).
    """
    shortcut = has.Conv2D(filters[2], 1, stride, name=_below(name, "downsample-0"))(x)
    return _bottleneck(x, filters, kernel, stride, name, has.BatchNormalization(name=_below(name, "downsample-1"))(shortcut))


def _bottleneck(x: Value, filters: tuple[int, int, int], kernel: int, stride: int, name: str | None, shortcut: Value) -> Value:
    for number, (outputs, size, step) in enumerate(zip(filters, (1, kernel, 1), (stride, 1, 1), strict=True), start=1):
        x = has.Conv2D(outputs, size, step, "same" if step == 1 else "valid", name=_below(name, f"conv{number}"))(x)
        x = has.BatchNormalization(name=_below(name, f"bn{number}"))(x)
        if number < len(filters):
            x = has.ReLU(name=_below(name, f"relu{number}"))(x)
    return has.ReLU(name=_below(name, "relu3"))(has.Add(name=_below(name, "add"))([x, shortcut]))


def _below(name: str | None, part: str) -> str | None:
    """The name of a block's part; Keras finds one where the block has none."""
    return f"{name}-{part}" if name else None
