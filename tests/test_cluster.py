"""Work on a Ray cluster of two nodes on this machine, one of which is killed while it works."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reslab
from reslab.cluster import connected, spread
from reslab.data.preprocess import Preprocess
from reslab.use import cluster as prediction
from reslab.use.artefact import TorchModel, save
from reslab.use.classifier import Classifier

from .conftest import COLOURS, draw

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*", "ignore::FutureWarning:ray.*", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.second = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    with connected(nodes.address):
        yield nodes
    nodes.shutdown()


def where(item: int) -> tuple[int, str]:
    import ray

    time.sleep(0.2)
    return item, ray.get_runtime_context().get_node_id()


def test_every_image_is_answered_once_when_a_node_is_killed(two_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "model"
    net = reslab.build("resnet20", num_classes=3).eval()
    half = np.full(3, 0.5, np.float32)
    save(Classifier(TorchModel(net, Preprocess(32, 32, 3, half, half)), tuple(COLOURS)), run)
    paths = [draw(tmp_path / f"{i}.png", (200, 40, 7 * i), i) for i in range(37)]
    paths[5].write_bytes(b"not an image")
    monkeypatch.setattr(prediction, "CHUNK", 4)

    second = two_nodes.second
    used: set[str] = set()
    for item, (same, node) in spread(where, range(12), two_nodes.address):
        assert item == same
        used.add(node)
    assert second.node_id in used, "both nodes work"

    found = []
    for index, answer in enumerate(prediction.predict_each(run, paths, two_nodes.address)):
        found.append(answer)
        if index == 6:  # in the middle: chunks are handed out to both
            two_nodes.remove_node(second, allow_graceful=False)
    assert [path for path, _ in found] == paths
    for (_, there), (_, here) in zip(found, reslab.load(run).predict_each(paths), strict=True):
        if isinstance(here, str):
            assert there == here
        else:  # in batches of another size the last bits differ
            assert there.label == here.label
            assert there.probability == pytest.approx(here.probability, abs=1e-5)


def test_errors_of_the_work_come_back_in_one_line(two_nodes: Any, tmp_path: Path) -> None:
    with pytest.raises(reslab.CallError, match=r"a finished run has model/spec\.json") as caught:
        list(prediction.predict_each(tmp_path / "none", [tmp_path / "a.png"], two_nodes.address))
    assert "\n" not in str(caught.value)
