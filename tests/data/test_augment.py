import numpy as np
import pytest
import torch
from torch import Generator

from reslab.data import augment


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def ramp(n: int, size: int, channels: int = 3) -> torch.Tensor:
    """Every pixel of every image a different number."""
    return torch.arange(1, n * channels * size * size + 1, dtype=torch.float32).view(n, channels, size, size)


def test_pad_crop_shifts_whole_images_within_the_padding() -> None:
    x = ramp(64, 8)
    y = augment.pad_crop(x, 2, seeded())
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    seen = set()
    for i in range(64):
        matches = [(r, c) for r in range(5) for c in range(5) if torch.equal(y[i], padded[i, :, r : r + 8, c : c + 8])]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 15, "the shifts must differ"


def test_what_comes_in_at_an_edge_can_be_the_image_reflected() -> None:
    x = ramp(16, 6)
    y = augment.pad_crop(x, 2, seeded(), reflect=True)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    for i in range(16):
        assert any(torch.equal(y[i], padded[i, :, r : r + 6, c : c + 6]) for r in range(5) for c in range(5))
    assert y.min() > 0, "no zeros"
    assert (augment.pad_crop(x, 2, seeded()) == 0).any()


def test_flip_mirrors_only_what_it_is_told() -> None:
    x = ramp(4, 5)
    y = augment.flip(x, torch.tensor([True, False, True, False]))
    assert torch.equal(y[0], x[0].flip(2))
    raw = augment.flip(x.permute(0, 2, 3, 1), torch.tensor([True, False, True, False]), across=2)
    assert torch.equal(raw.permute(0, 3, 1, 2), y)
    assert torch.equal(y[1], x[1])


def test_cutout_zeroes_at_most_one_square() -> None:
    y = augment.cutout(torch.ones(100, 3, 32, 32), 8, seeded())
    holes = (y == 0).sum((1, 2, 3)) / 3
    assert holes.max() == 64
    assert holes.min() >= 16
    assert ((y == 0).any(1) == (y == 0).all(1)).all(), "all channels alike"


def test_mixup_and_cutmix_blend_targets_as_they_blend_images() -> None:
    x = torch.zeros(16, 1, 20, 20)
    x[8:] = 1
    targets = torch.nn.functional.one_hot(torch.tensor([0] * 8 + [1] * 8), 2).float()
    for mix in (augment.mixup, augment.cutmix):
        for seed in range(20):
            mixed, blended = mix(x, targets, 1.0, seeded(seed))
            assert torch.allclose(mixed.mean((1, 2, 3)), blended[:, 1], atol=1e-5)


def test_lighting_shifts_colour_along_the_components() -> None:
    x, std = torch.zeros(2000, 3, 2, 2), torch.tensor([0.2, 0.25, 0.3])
    shift = augment.lighting(x, 0.1, std, seeded())[:, :, 0, 0] * std
    components = torch.tensor(augment.LIGHTING_VECTORS)
    spread = (shift @ components).std(0)
    assert torch.allclose(spread, 0.1 * torch.tensor(augment.LIGHTING_VALUES), rtol=0.1)
    assert torch.equal(augment.lighting(x[:, :1], 0.1, std, seeded()), x[:, :1])


def test_jitter_is_brightness_contrast_saturation_and_hue_one_after_the_other() -> None:
    """Against the four written out, each by its definition, for amounts that clip nothing."""
    x = 0.4 + 0.2 * torch.rand(16, 3, 8, 8, generator=seeded())
    bright, contrast, saturation = 1 + 0.1 * (2 * torch.rand(3, 16, 1, 1, generator=(generator := seeded(1))) - 1)
    angle = 2 * torch.pi * 0.1 / 4 * (2 * torch.rand(16, generator=generator) - 1)

    def luma(y: torch.Tensor) -> torch.Tensor:
        return (y * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)

    y = x * bright[..., None]
    mean = luma(y).mean((2, 3), keepdim=True)
    y = mean + contrast[..., None] * (y - mean)
    y = luma(y) + saturation[..., None] * (y - luma(y))
    got = augment.jitter(x, 0.1, seeded(1))
    assert torch.allclose(luma(got), luma(y), atol=1e-4), "a turn of the hue keeps luma"
    yiq = torch.tensor(augment.TO_YIQ)
    before, after = (torch.einsum("ij,njhw->nihw", yiq, picture)[:, 1:] for picture in (y, got))
    turned = torch.complex(*before.unbind(1)) * torch.exp(1j * angle).view(-1, 1, 1)
    assert torch.allclose(torch.complex(*after.unbind(1)), turned, atol=1e-4)


def test_jitter_keeps_grey_grey_and_the_range() -> None:
    grey = torch.rand(8, 1, 6, 6, generator=seeded())
    got = augment.jitter(grey.expand(-1, 3, -1, -1), 0.8, seeded(2))
    assert torch.allclose(got, got[:, :1].expand_as(got), atol=1e-5)
    assert torch.allclose(got[:, :1], augment.jitter(grey, 0.8, seeded(2)), atol=1e-5)
    assert (got.min(), got.max()) == (0, 1)


def test_randaugment_stays_in_range_and_leaves_the_global_generator_alone() -> None:
    x = torch.rand(8, 3, 32, 32, generator=seeded())
    state = torch.get_rng_state()
    y = augment.randaugment(x, 2, seeded(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert y.shape == x.shape
    assert 0 <= y.min() <= y.max() <= 1
    assert not torch.allclose(x, y)
    assert torch.equal(y, augment.randaugment(x, 2, seeded(3)))


def test_randaugment_draws_operations_for_each_image() -> None:
    """Two of fifteen, in either order: 64 copies of one image would otherwise be four at most, by their signs."""
    x = torch.rand(1, 3, 32, 32, generator=seeded()).expand(64, -1, -1, -1)
    assert len({tuple(image.flatten().tolist()) for image in augment.randaugment(x, 2, seeded(3))}) > 40
    grey = augment.randaugment(torch.rand(8, 1, 16, 16, generator=seeded()), 1, seeded(3))
    assert grey.shape == (8, 1, 16, 16)


def test_equal_seeds_give_equal_batches() -> None:
    x = torch.randn(8, 3, 16, 16, generator=seeded())
    for make in (lambda g: augment.pad_crop(x, 2, g), lambda g: augment.jitter(x, 0.4, g), lambda g: augment.cutout(x, 4, g)):
        assert torch.equal(make(seeded(5)), make(seeded(5)))
        assert not torch.equal(make(seeded(5)), make(seeded(6)))


def test_a_pasted_box_has_the_share_that_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "_beta", lambda alpha, generator: 0.75)
    x = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 16, 16)
    pasted = [augment.cutmix(x, torch.eye(2), 1.0, seeded(seed))[0][0] for seed in range(100)]
    assert max(int((image == 1).sum()) for image in pasted) == 64, "a quarter, where the box lies inside"


def test_shares_of_a_mix_are_drawn_from_both_ends_alike() -> None:
    generator = seeded()
    shares = np.array([augment._beta(0.2, generator) for _ in range(4000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.05)


def test_operations_of_randaugment_are_at_a_third_of_their_strength() -> None:
    policies = pytest.importorskip("kornia.augmentation.auto.rand_augment.rand_augment", reason="the extra `augment` is not installed").default_policy
    move = augment._operations()[[policy[0][0] for policy in policies].index("translate_x")]
    x = torch.zeros(8, 3, 60, 60)
    x[..., 30] = 1
    assert set((move(x)[:, 0, 30].argmax(1) - 30).abs().tolist()) == {2}, "of a tenth of the width"
