"""Digits, prepared for a study in a folder of its own."""

import pytest

from reslab.data.source import open_images
from reslab.data.split import split
from reslab.study.data import Data, load, prepare
from reslab.study.lab import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    store = tmp_path_factory.mktemp("study")
    _, folder = prepare(split(open_images("digits"), 0), 8, store)
    return Place(store / "out", store, folder)


@pytest.fixture
def data(place: Place) -> Data:
    return load(place.data)
