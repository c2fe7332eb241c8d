import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import reslab
from reslab.errors import CallError
from reslab.train.optim import lr_at
from reslab.train.recipe import MADE_FOR, RECIPES, Recipe, find_recipe, from_dict, helps, resolve


def test_paper_cifar_is_the_papers_protocol() -> None:
    """He et al. 2015, section 4.2: SGD, momentum 0.9, decay 1e-4 on all, 128 images, 0.1 / 10 at 32k and 48k of 64k steps."""
    recipe = RECIPES["paper-cifar"]
    want = {
        "optimizer": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "decay_all": True, "batch_size": 128, "lr": 0.1,
        "schedule": "step", "steps": 64_000, "milestones": (0.5, 0.75), "warmup": 0.0, "pad": 4, "crop": "pad", "flip": "random",
        "normalize": "pixel-mean", "label_smoothing": 0.0, "ema": 0.0, "mixup": 0.0, "keep": "last",
    }  # fmt: skip
    assert {name: asdict(recipe)[name] for name in want} == want
    assert replace(RECIPES["paper-cifar-110"], warmup_lr=0.0) == recipe
    assert RECIPES["paper-cifar-110"].warmup_lr == 0.01


def test_paper_imagenet_is_the_papers_protocol() -> None:
    """He et al. 2015, section 3.4: 256 images, 0.1 / 10 on plateau, decay 1e-4, short side in [256, 480], crop 224, colour."""
    recipe = RECIPES["paper-imagenet"]
    want = {
        "batch_size": 256,
        "lr": 0.1,
        "schedule": "plateau",
        "weight_decay": 1e-4,
        "crop": "scale",
        "image_size": 224,
        "lighting": 0.1,
        "steps": 600_000,
    }
    assert {name: asdict(recipe)[name] for name in want} == want


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_being_written_and_typed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from reslab import cli

    assert from_dict(asdict(RECIPES[name])) == RECIPES[name]
    caught = {}
    monkeypatch.setattr("reslab.job.train", lambda *a, **k: caught.update(k) or _Done())
    cli.app(["train", "digits", *shlex.split(RECIPES[name].as_call)])
    assert find_recipe("quick", **{k: v for k, v in caught.items() if k in helps()}) == RECIPES[name]


def test_a_recipe_without_milestones_is_typed_so() -> None:
    assert find_recipe("quick", schedule="step", milestones=()).as_call == "--schedule step --empty-milestones"


class _Done:
    path = Path("x")

    def last(self, kind: str) -> dict[str, float]:
        figures = {f"{k}{e}": 0.5 for k in ("top1", "loss", "ece") for e in ("", "_low", "_high")}
        return {"n": 1, **figures}


def test_defaults_follow_the_data() -> None:
    digits = resolve(Recipe(), train_images=1259, image_size=8, upright=True)
    assert (digits.flip, digits.pad, digits.crop, digits.batch_size, digits.epochs) == ("none", 1, "pad", 78, 60)
    photos = resolve(Recipe(), train_images=50_000, image_size=224, upright=False)
    assert (photos.flip, photos.crop, photos.batch_size, photos.epochs) == ("alternate", "resized", 128, 28)
    assert resolve(Recipe(flip="none", pad=2), 100, 32, False).flip == "none"


def test_a_recipe_may_have_its_own_net_which_a_named_one_replaces(tmp_path: Path) -> None:
    given = {"recipe": "sprint", "batch_size": 64, "steps": 2}
    assert set(MADE_FOR) <= set(RECIPES)
    assert reslab.train("digits", out=tmp_path / "own", **given).config["net"] == MADE_FOR["sprint"] == "resnet8"
    assert reslab.train("digits", "resnet20", tmp_path / "named", **given).config["net"] == "resnet20"


def test_steps_replace_the_epochs_of_a_recipe() -> None:
    assert resolve(find_recipe("finetune", steps=7), 1000, 32, False).steps == 7
    assert resolve(find_recipe("paper-cifar", epochs=3), 1000, 32, False).epochs == 3


def test_the_call_of_a_recipe_makes_it_again() -> None:
    made = resolve(find_recipe("quick", steps=7), 1000, 32, False)
    assert made.epochs == 1
    given = dict(zip(*[iter(made.as_call.split())] * 2, strict=True))
    assert given["--steps"] == "7"
    assert "--epochs" not in given


def test_a_resolved_recipe_says_nothing_that_is_not_done() -> None:
    photos = resolve(find_recipe("sprint"), 1000, 224, False)
    assert (photos.crop, photos.pad, photos.edge) == ("resized", 0, "zero")
    held = resolve(find_recipe("quick", warmup_lr=0.01), 1000, 32, False)
    assert (held.warmup, lr_at(held, 0.01)) == (0.0, pytest.approx(0.05, rel=0.02))


def test_a_file_of_epochs_and_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("epochs = 5\nsteps = 100\n")
    with pytest.raises(CallError, match="received 100 and 5: leave one out"):
        find_recipe(str(tmp_path / "own.toml"))


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(CallError, match="batch_size 512, 100 images; lower --batch-size"):
        resolve(Recipe(batch_size=512), 100, 32, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"leraning_rate": 1.0}, "unknown recipe field 'leraning_rate'"),
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"lr": -1.0}, "lr must be from 0 to 1000; received -1"),
        ({"lr": "fast"}, "lr"),
        ({"epochs": 2.5}, "epochs"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"nesterov": "maybe"}, "nesterov"),
        ({"epochs": 2, "steps": 1000}, "both say how long a training is; received 1000 and 2: leave one out"),
        ({"milestones": (32000.0, 48000.0)}, "shares of the training, between 0 and 1; received 32000, 48000"),
        ({"milestones": (0.5, float("nan"))}, "between 0 and 1; received 0.5, nan"),
        ({"schedule": "plateau", "patience": 10}, "received --patience 10, which stops before that is of use"),
    ],
)
def test_wrong_fields_are_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(CallError, match=message) as caught:
        find_recipe("quick", **fields)
    assert "\n" not in str(caught.value)


def test_recipe_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("lr = 0.5\nepochs = 3\nflip = 'none'\n")
    assert find_recipe(str(file), seed=4) == replace(Recipe(), lr=0.5, epochs=3, flip="none", seed=4)
    for text, message in (("lrr = 1", "did you mean 'lr'"), ("lr = ", "must be TOML")):
        file.write_text(text)
        with pytest.raises(CallError, match=message):
            find_recipe(str(file))
    with pytest.raises(CallError, match="must be TOML"):
        find_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(CallError, match="unknown recipe 'quik': did you mean 'quick'"):
        find_recipe("quik")


def test_an_image_is_not_reflected_by_more_than_it_has() -> None:
    assert resolve(Recipe(edge="reflect", pad=7), 1000, 8, upright=False).pad == 7
    with pytest.raises(CallError, match="received --pad 8 for 8 px: lower it, or leave out --edge reflect"):
        resolve(Recipe(edge="reflect", pad=8), 1000, 8, upright=False)
