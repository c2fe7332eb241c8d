"""The 95 % interval of a share."""

import math

Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927); everything from 0 to 1 where nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    middle, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + Z * Z / n)), min(1.0, (middle + half) / (1 + Z * Z / n))


def share(name: str, successes: int, n: int) -> dict[str, float]:
    """A share and its interval as facts of a record: NAME, NAME_low, NAME_high."""
    low, high = wilson(successes, n)
    return {name: successes / n, f"{name}_low": low, f"{name}_high": high}
