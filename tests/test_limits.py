import pytest

from reslab.errors import CallError
from reslab.limits import bytes_of, seconds


@pytest.mark.parametrize(
    ("told", "meant"),
    [(90, 90), ("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400), ("1h30m", 5400), ("1H30M", 5400), ("300h", 1_080_000)],
)
def test_times(told: str | int, meant: float) -> None:
    assert seconds(told) == meant
    assert seconds(f"{meant:.12g}s") == meant  # as run.toml tells it


@pytest.mark.parametrize("told", ["1h30", "20m5", "", "h", "-1", "1e5s", "1.2.3s", "nan", 0])
def test_what_is_no_time_is_one_line(told: str | int) -> None:
    with pytest.raises(CallError, match=r"--budget must be a time such as 90s, 20m or 1h30m; received"):
        seconds(told)


def test_amounts() -> None:
    assert [bytes_of(told) for told in (None, 5, "512M", "4G", "1.5GiB", "2kb")] == [None, 5, 512 << 20, 4 << 30, 3 << 29, 2048]
    with pytest.raises(CallError, match="--memory must be an amount"):
        bytes_of("4 apples")


def test_units_are_powers_of_1024() -> None:
    assert [bytes_of(f"1.5{unit}") for unit in "KMGT"] == [3 * 2**9, 3 * 2**19, 3 * 2**29, 3 * 2**39]
