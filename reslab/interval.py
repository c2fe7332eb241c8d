"""The 95 % interval of a share, and shares in words."""

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


def percent(share: float, digits: int = 1, space: str = "\N{NO-BREAK SPACE}") -> str:
    """A share as "98.7 %". What is less than all is not rounded to all: it is "> 99.9 %"."""
    text = limit(share, digits, space)
    return text if share >= 1 or float(f"{100 * share:.{digits}f}") < 100 else f"> {limit(1 - 10 ** -(digits + 2), digits, space)}"


def limit(share: float, digits: int = 1, space: str = "\N{NO-BREAK SPACE}") -> str:
    """An end of an interval likewise, only rounded."""
    return f"{100 * share:.{digits}f}{space}%"
