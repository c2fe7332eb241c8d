"""A matrix product over all pixels, with what comes before and after it in one pass over memory, by matrix tiles in C (product.c)."""

import ctypes
from ctypes import byref, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from reslab.nets import tiles
from reslab.nets.compiler import FAILURES, at, compiled

SOURCE = Path(__file__).with_name("product.c")
PAIR = 32  # channels, and pixels, of two tiles


def product(
    x: Tensor,
    filters: Tensor,
    *,
    back: bool = False,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    rectify: bool = False,
    gate: Tensor | None = None,
    second: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Every pixel of x times filters (O, C), or (C, O) with `back`; and each channel's sum of what comes out, fp32.

    Then come: what is `second`, images and filters likewise, fp32 `shift` (O), and `added`. With `rectify` what is negative becomes
    zero, with `gate` what stands where that is not positive. Images are (N, C, H, W), channels-last, and like filters bf16;
    channels are multiples of PAIR, and there are as many pixels. Sums are fp32, rounded once when written; the channels' sums are of
    what is not yet rounded. For where it is `usable`.
    """
    n, inputs, height, width = x.shape
    outputs = filters.shape[1 if back else 0]
    assert usable() and filters.shape[0 if back else 1] == inputs and (shift is None or shift.dtype == torch.float32)
    assert all(t is None or (t.dtype == x.dtype and t.shape == (n, outputs, height, width)) for t in (added, gate))
    y = torch.empty((n, outputs, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    total = torch.empty(outputs, dtype=torch.float32, device=x.device)
    filters, (more, others) = filters.contiguous(), second or (None, None)
    walk = _Product(n * height * width, inputs, 0 if more is None else more.shape[1], outputs, *map(at, (x, more, added, gate, shift, y)), rectify)
    if _library().product(byref(walk), at(filters), at(others), back, at(total), torch.get_num_threads()):
        raise MemoryError("no memory for the filters of a product")
    return y, total


@cache
def usable() -> bool:
    """Whether the processor has tiles, the kernel lends them and a compiler makes the library."""
    try:
        return tiles.usable() and bool(_library())
    except FAILURES:
        return False


class _Product(ctypes.Structure):
    """As in product.c."""

    _fields_ = (
        [(name, c_int64) for name in ("pixels", "inputs", "seconds", "outputs")]
        + [(name, c_void_p) for name in ("x", "second", "added", "gate", "shift", "y")]
        + [("rectify", c_int)]
    )


@cache
def _library() -> ctypes.CDLL:
    """Raises one of FAILURES where it cannot be made."""
    library = compiled(SOURCE)
    library.product.argtypes = [c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_int]
    return library
