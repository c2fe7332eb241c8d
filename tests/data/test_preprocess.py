"""The preprocessing that is stored with a model, as a damaged file has it."""

import numpy as np
import pytest

import reslab
from reslab.data.preprocess import Preprocess

WHOLE = {"image_size": 8, "canvas": 8, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "tta": "none"}


@pytest.mark.parametrize(
    "damage",
    [
        {"mean": [0.5, float("nan"), 0.5]},
        {"mean": np.full((3, 8, 8), np.inf).tolist()},
        {"mean": [0.5, 1e300, 0.5]},
        {"std": [0.25, float("inf"), 0.25]},
        {"std": [0.25, 0.0, 0.25]},
        {"std": [0.25, -0.25, 0.25]},
    ],
    ids=["nan", "infinite mean image", "beyond float32", "infinite", "zero", "negative"],
)
def test_a_mean_or_deviation_that_cannot_be_is_refused(damage: dict[str, object]) -> None:
    assert Preprocess.from_dict(WHOLE).to_dict() == WHOLE
    with pytest.raises(reslab.WorkError, match="mean and std must be finite, and std above 0"):
        Preprocess.from_dict(WHOLE | damage)


def test_a_number_that_no_float_holds_is_one_line() -> None:
    with pytest.raises(reslab.WorkError, match="preprocessing stored with the model is damaged"):
        Preprocess.from_dict(WHOLE | {"mean": [10**400] * 3})
