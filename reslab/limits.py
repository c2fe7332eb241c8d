"""What a job may take of the machine, as a person writes it: time and memory."""

import re
from typing import NamedTuple

from reslab.errors import CallError, shown

UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}  # powers of two


class Limits(NamedTuple):
    """Seconds for everything, and bytes that each process may hold; None is no limit."""

    seconds: float | None = None
    memory: int | None = None


def seconds(budget: str | float | None) -> float | None:
    """A time such as 90, "90s", "20m", "1.5h" or "1h30m" in seconds. Raises CallError."""
    if budget is None:
        return None
    parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?|([\d.]+)", str(budget).strip().lower())
    try:
        total = sum(float(part) * unit for part, unit in zip(parts.groups(), (3600, 60, 1, 1), strict=True) if part) if parts else 0.0
    except ValueError:
        total = 0.0
    if not 0 < total < 1e8:
        raise CallError(f"--budget must be a time such as 90s, 20m or 1h30m; received {shown(str(budget))!r}")
    return total


def bytes_of(memory: str | int | None) -> int | None:
    """An amount such as 4G, "512M" or "1.5GiB" in bytes, units being powers of 1024. Raises CallError."""
    if memory is None:
        return None
    parts = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)(?:i?b)?", str(memory).strip().lower())
    total = int(float(parts[1]) * 2 ** UNITS[parts[2]]) if parts else 0
    if not 0 < total < 1 << 60:
        raise CallError(f"--memory must be an amount such as 4G or 512M; received {shown(str(memory))!r}")
    return total
