import numpy as np
import pytest
import torch
from torch import Generator

from reslab.data.boxes import cut, least_side, resized, scaled


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_resized_boxes_lie_inside_and_have_the_asked_area_and_shape() -> None:
    left, top, width, height = resized(5000, seeded()).T
    assert min(left.min(), top.min()) >= 0
    assert max((left + width).max(), (top + height).max()) <= 1 + 1e-6
    assert (width * height).max() <= 1
    assert (width * height).min() >= 0.35 - 1e-6
    assert 3 / 4 - 1e-5 <= (width / height).min() < 0.76 < 1.32 < (width / height).max() <= 4 / 3 + 1e-5
    assert left.std() > 0.05, "they must differ"


def test_scaled_boxes_are_squares_of_the_papers_sizes() -> None:
    left, top, width, height = scaled(5000, seeded()).T
    assert (width == height).all()
    assert set(np.round(224 / width).astype(int)) == set(range(256, 481))
    assert max((left + width).max(), (top + height).max()) <= 1 + 1e-6


def test_equal_seeds_give_equal_boxes() -> None:
    for make in (resized, scaled):
        assert np.array_equal(make(20, seeded(5)), make(20, seeded(5)))
        assert not np.array_equal(make(20, seeded(5)), make(20, seeded(6)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_box_of_a_ramp_holds_its_stretch_of_it(channels: int) -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, channels)).copy()
    part = cut(ramp, np.array([0.25, 0.5, 0.5, 0.25], np.float32), 50)
    assert part.shape == (50, 50, channels)
    assert part.dtype == torch.uint8
    assert (part.float()[10, :, 0] - torch.linspace(50.5, 148.5, 50)).abs().max() <= 1
    whole = cut(ramp, np.array([0, 0, 1, 1], np.float32), 200)
    assert np.array_equal(whole.numpy(), ramp), "the whole at its own size is the image itself"
    last = cut(ramp, np.array([0.999, 0.999, 0.001, 0.001], np.float32), 4)
    assert (last == 199).all(), "a box of less than a pixel is one pixel"


def test_a_reduced_image_must_still_fill_the_box() -> None:
    assert least_side(np.array([0, 0, 0.5, 0.8], np.float32), 224) == 448
