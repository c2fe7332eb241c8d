"""The leaves of a Keras net that Keras does not have. NHWC, in whatever framework Keras runs on.

Each is registered as "reslab>NAME": once this module is imported, `keras.models.load_model` knows them, in safe mode too.
Their parameters bear the torch module's names.
"""

from typing import Any

import numpy as np

from reslab.keras_backend import keras

register = keras.saving.register_keras_serializable(package="reslab")
Value = Any  # a tensor of Keras's backend


@register
class AddExclusive(keras.layers.Layer):
    """[F, x, g] -> g F + (1 - g) x: exclusive gating, as in highway networks."""

    def call(self, inputs: list[Value]) -> Value:
        branch, shortcut, gate = inputs
        return gate * branch + (1 - gate) * shortcut


@register
class AddGated(keras.layers.Layer):
    """[F, x, g] -> F + (1 - g) x: shortcut-only gating."""

    def call(self, inputs: list[Value]) -> Value:
        branch, shortcut, gate = inputs
        return branch + (1 - gate) * shortcut


@register
class PadShortcut(keras.layers.Layer):
    """Shortcut A: every `stride`-th pixel, and zero channels added on both sides up to `outputs`. It has no parameters."""

    def __init__(self, outputs: int, stride: int, **options: Any) -> None:
        super().__init__(**options)
        self.outputs, self.stride = outputs, stride

    def call(self, x: Value) -> Value:
        added = self.outputs - x.shape[-1]
        return keras.ops.pad(x[:, :: self.stride, :: self.stride], [(0, 0), (0, 0), (0, 0), (added // 2, added - added // 2)])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "outputs": self.outputs, "stride": self.stride}


@register
class BlurPool(keras.layers.Layer):
    """Every `stride`-th pixel of x smoothed by (1 2 1)^T (1 2 1) / 16, edges reflected: Zhang 2019 (1904.11486)."""

    def __init__(self, stride: int, **options: Any) -> None:
        super().__init__(**options)
        self.stride = stride

    def build(self, shape: tuple[Any, ...]) -> None:
        line = np.array([0.25, 0.5, 0.25], np.float32)
        self.kernel = np.tile(np.outer(line, line)[:, :, None, None], (1, 1, shape[-1], 1))  # exporters need it whole

    def call(self, x: Value) -> Value:
        kernel = keras.ops.convert_to_tensor(self.kernel, dtype=x.dtype)
        x = keras.ops.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
        return keras.ops.depthwise_conv(x, kernel, self.stride, "valid", "channels_last")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "stride": self.stride}


@register
class Shift(keras.layers.Layer):
    """x + b with one learned scalar that starts at zero: Fixup (Zhang et al. 2019, 1901.09321)."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.bias = self.add_weight(shape=(1,), initializer="zeros", name="bias")

    def call(self, x: Value) -> Value:
        return x + self.bias


@register
class ScaleShift(keras.layers.Layer):
    """a x + b with two learned scalars, one and zero at the start: the end of a Fixup branch."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.weight = self.add_weight(shape=(1,), initializer="ones", name="weight")
        self.bias = self.add_weight(shape=(1,), initializer="zeros", name="bias")

    def call(self, x: Value) -> Value:
        return self.weight * x + self.bias


@register
class Scale(keras.layers.Layer):
    """a x with one learned scalar that starts at zero: SkipInit (De & Smith 2020) and ReZero (Bachlechner et al. 2020)."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.weight = self.add_weight(shape=(1,), initializer="zeros", name="weight")

    def call(self, x: Value) -> Value:
        return self.weight * x
