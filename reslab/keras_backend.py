"""Keras, imported on the framework that its user chose, or else on torch. Everything of ours takes `keras` from here."""

import importlib.util
import json
import os
import sys

from reslab.errors import needs_extra
from reslab.host import expanded


def _is_chosen() -> bool:
    """By a Keras that is imported already, by KERAS_BACKEND, or in keras.json, where Keras itself writes "tensorflow"."""
    if "keras" in sys.modules or os.environ.get("KERAS_BACKEND"):
        return True
    file = expanded(os.environ.get("KERAS_HOME", "~/.keras") + "/keras.json")
    try:
        held = json.loads(file.read_text("utf-8")) if file else {}
        return bool(held["backend"] != "tensorflow")
    except (OSError, ValueError, KeyError, TypeError):
        return False


if not importlib.util.find_spec("keras"):
    raise needs_extra("keras", "keras")
if not _is_chosen():
    os.environ["KERAS_BACKEND"] = "torch"

import keras as keras  # noqa: E402  # the choice comes first
