import pytest

from reslab.interval import limit, percent


@pytest.mark.parametrize(
    ("share", "digits", "said"),
    [
        (0.98765, 1, "98.8 %"),
        (0.9996, 1, "> 99.9 %"),
        (0.9994, 1, "99.9 %"),
        (0.999996, 2, "> 99.99 %"),
        (0.996, 0, "> 99 %"),
        (1, 1, "100.0 %"),
        (0, 1, "0.0 %"),
    ],
)
def test_what_is_less_than_all_is_not_said_to_be_all(share: float, digits: int, said: str) -> None:
    assert percent(share, digits, " ") == said


def test_the_end_of_an_interval_is_rounded() -> None:
    assert limit(0.9996) == "100.0\N{NO-BREAK SPACE}%"
