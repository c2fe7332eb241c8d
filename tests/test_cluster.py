"""Work on a Ray cluster of two nodes on this machine, one of which is killed while it works."""

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reslab
from reslab.cluster import Pool, connected, spread
from reslab.data.preprocess import Preprocess
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.errors import WorkError
from reslab.study import degradation, lab
from reslab.study.data import prepare
from reslab.study.kinds import Cell, Schedule, Setting, Subject
from reslab.study.lab import Place
from reslab.use import cluster as prediction
from reslab.use.artefact import TorchModel, save
from reslab.use.classifier import Classifier, Prediction

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


def test_paths_are_those_of_who_asks_and_shipped_nets_go_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(work: Callable[[Any], Any], chunks: Iterator[Any], address: str) -> Iterator[Any]:
        for chunk in chunks:
            monkeypatch.chdir("/")
            yield chunk, work(chunk)

    draw(tmp_path / "here.png", COLOURS["red"], 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prediction, "spread", elsewhere)
    [(path, found)] = prediction.predict_each("resnet20-cifar10", ["here.png"], "local")
    assert path == Path("here.png")
    assert isinstance(found, Prediction), found


def test_an_address_where_nothing_answers_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    resolve = socket.getaddrinfo

    def without_network(host: str, *more: Any) -> Any:
        if host == "nowhere.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *more)

    monkeypatch.setattr(socket, "getaddrinfo", without_network)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        for silent in (address, f"ray://{address}", "nowhere.invalid:6379", "no port"):
            with pytest.raises(WorkError, match="must be the address of a running Ray cluster"), connected(silent):
                pass


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
    for item, (same, node) in spread(where, range(300), two_nodes.address):
        assert item == same
        used.add(node)
        if item >= 11 and second.node_id in used:
            break
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


def test_a_study_on_a_cluster_measures_what_it_measures_here(two_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cells(setting: Setting, data: object, pace: object) -> list[Cell]:
        return [Cell(f"seed {seed}", Subject(setting.net, seed, Schedule(4, 32)), facts={"twin": "residual", "layers": 8}) for seed in range(2)]

    monkeypatch.setattr(lab, "find", lambda name: replace(degradation.STUDY, cells=cells))
    setting = Setting(600, 2, 2, reslab.spec("resnet20", depths=(1, 1, 1), in_channels=1))
    _, folder = prepare(split(open_images("digits"), 0), 8, tmp_path)
    here, there = (Place(tmp_path / name, tmp_path / name, folder) for name in ("here", "there"))
    with Pool(two_nodes.address) as pool:
        assert pool.cores >= 1
        far = lab.run("degradation", there, setting, lambda _: None, workers=lambda jobs, begin: Pool(two_nodes.address, begin))
    near = lab.run("degradation", here, setting, lambda _: None)
    assert far == near
    assert (far.done, far.planned) == (2, 2)
