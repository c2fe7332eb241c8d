from itertools import cycle

import pytest
import torch

import reslab
from reslab.train import plan
from reslab.train.hardware import machine
from reslab.train.recipe import Recipe, resolve


def test_the_first_step_which_pays_for_new_memory_is_no_estimate_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve(Recipe(epochs=3, batch_size=8, precision="fp32", low_resolution=0.5), 80, 16, upright=False)
    clock = cycle([0.0, 10.0, 10.0, 12.0])  # a first of ten seconds, then one of two
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
    with machine() as here:
        made = plan.make_plan(reslab.build("resnet20", num_classes=2), torch.randn(8, 3, 16, 16), recipe, train=80, val=16, macs=0, machine=here)
    assert (made.step_seconds, made.low_step_seconds, made.val_seconds) == (2, 2, 4)
    assert made.seconds(made.steps, 0.5) == 60 + 3 * 4
