"""reslab: the workbench for residual networks. Build one from a spec, train it on your images, see why it trains, ship it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import reslab.train  # noqa: F401  # the package is bound first, so that no later import can hide the function of the same name
from reslab.errors import CallError, WorkError
from reslab.family import FAMILY, spec
from reslab.spec import Cost, Spec

if TYPE_CHECKING:
    from reslab.job import train
    from reslab.nets.saving import save_weights
    from reslab.nets.torch import build
    from reslab.nets.weights import load_weights
    from reslab.train.recipe import RECIPES, Recipe
    from reslab.use.classifier import Classifier, Prediction, load
else:
    del train

__version__ = "0.1.0"
__all__ = [
    "FAMILY",
    "RECIPES",
    "CallError",
    "Classifier",
    "Cost",
    "Prediction",
    "Recipe",
    "Spec",
    "WorkError",
    "build",
    "load",
    "load_weights",
    "save_weights",
    "spec",
    "train",
]

_HOMES = {
    "Classifier": "reslab.use.classifier",
    "Prediction": "reslab.use.classifier",
    "RECIPES": "reslab.train.recipe",
    "Recipe": "reslab.train.recipe",
    "build": "reslab.nets.torch",
    "load": "reslab.use.classifier",
    "load_weights": "reslab.nets.weights",
    "save_weights": "reslab.nets.saving",
    "train": "reslab.job",
}


def __getattr__(name: str) -> Any:
    """Loads a public name's module, and with it torch, when the name is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'reslab' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
