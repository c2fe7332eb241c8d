"""Small maps as one with long rows, which oneDNN convolves faster on a processor with AMX: a column of zeros lies behind each, so
what a 3x3 filter sees of its own map is the same. In bf16 it takes a fifth of the time at 4 pixels, copies included (docs/log.md)."""

from torch import Tensor

LONG = 96  # pixels of a row, at most


def side_by_side(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N / count, C, H, count x (W + 1)), channels-last."""
    n, channels, height, width = x.shape
    count = _count(n, width)
    rows = x.new_zeros(n // count, height, count, width + 1, channels)
    rows[:, :, :, :width] = x.permute(0, 2, 3, 1).view(n // count, count, height, width, channels).transpose(1, 2)
    return rows.view(n // count, height, -1, channels).permute(0, 3, 1, 2)


def apart(laid: Tensor, like: Tensor) -> Tensor:
    """The inverse, into maps `like` those before but for their channels, whatever stands in the columns between them."""
    n, _, height, width = like.shape
    count = _count(n, width)
    maps = laid.permute(0, 2, 3, 1).view(n // count, height, count, width + 1, -1)[:, :, :, :-1]
    return maps.transpose(1, 2).reshape(n, height, width, -1).contiguous().permute(0, 3, 1, 2)


def _count(maps: int, width: int) -> int:
    """As many as fit into a long row and divide all maps."""
    return max(divisor for divisor in range(1, max(1, LONG // (width + 1)) + 1) if maps % divisor == 0)
