import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import reslab
from reslab.family import FAMILY
from reslab.nets import keras_files
from reslab.nets.keras import build, from_torch, keras, save
from reslab.nets.keras_files import CONFIG, WEIGHTS, is_keras, read_h5
from reslab.nets.keras_weights import from_keras, to_keras, torch_names
from tests.conftest import scramble
from tests.nets.parity import TOLERANCE, shallow

EVERY_KIND = ("resnet20", "resnet110_fixup", "resnet110_skipinit", "resnet50_gn", "skipblock8", "se_resnet20", "resnext50_32x4d", "keras_resnet50")


def _weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_weights_go_to_keras_and_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    spec = shallow(FAMILY[name].spec)
    net, again = scramble(reslab.build(spec)), reslab.build(spec)
    from_keras(from_torch(net), again)
    assert _equal(_weights(net), _weights(again))
    save(net, tmp_path / "net.keras")
    assert _equal(read_h5(tmp_path / "net.keras"), _weights(net))


def test_another_specs_weights_are_refused_and_nothing_changes() -> None:
    net, model = reslab.build("resnet20"), build("resnet32")
    before = [np.array(w) for w in model.get_weights()]
    with pytest.raises(reslab.CallError, match=r"layer1\.3\.conv1\.weight is missing in one and \(3, 3, 16, 16\) in the other"):
        to_keras(net, model)
    with pytest.raises(reslab.CallError, match=r"fc\.weight is \(10, 64\) in one and \(7, 64\) in the other"):
        from_keras(build("resnet20"), reslab.build("resnet20", num_classes=7))
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize(("name", "application"), [("keras_resnet50", "ResNet50"), ("keras_resnet50v2", "ResNet50V2")])
def test_keras_applications_give_the_same_and_each_of_its_files_is_read(name: str, application: str, tmp_path: Path) -> None:
    theirs = getattr(keras.applications, application)(weights=None, classifier_activation=None)
    net = scramble(reslab.build(name)).eval()
    to_keras(net, theirs)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        want = theirs(x.permute(0, 2, 3, 1), training=False)
        assert (net(x) - want).abs().max() < TOLERANCE * want.abs().max()
    for file in ("net.keras", "net.h5", "net.weights.h5"):
        (theirs.save_weights if "weights" in file else theirs.save)(tmp_path / file)
        assert is_keras(tmp_path / file)
        assert _equal(read_h5(tmp_path / file), _weights(net))
        (tmp_path / file).unlink()


def test_names_of_the_teaching_network_are_known() -> None:
    theirs = ["conv1", "bn_conv1", "res2a_branch2a", "bn2a_branch2c", "res3a_branch1", "bn3a_branch1", "res5c_branch2b", "fc6"]
    ours = ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn3", "layer2.0.downsample.0", "layer2.0.downsample.1", "layer4.2.conv2", "fc"]
    assert list(torch_names(theirs).values()) == ours


def test_every_name_of_ours_comes_back() -> None:
    for row in FAMILY.values():
        names = [layer.name for layer in shallow(row.spec).layers(row.spec.flatten or 64)]
        assert list(torch_names(name.replace(".", "-") for name in names).values()) == names


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keras") / "good.keras"
    save(scramble(reslab.build(shallow(reslab.spec("resnet20")))), path)
    return path


def _members(good: Path) -> tuple[bytes, bytes]:
    with zipfile.ZipFile(good) as archive:
        return archive.read(CONFIG), archive.read(WEIGHTS)


def _zip(path: Path, config: bytes, weights: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(CONFIG, config)
        archive.writestr(WEIGHTS, weights)


def _old(change: Callable[[h5py.Group], object]) -> Callable[[Path, Path], None]:
    """An old .h5 with one layer, to which something is done."""

    def make(path: Path, good: Path) -> None:
        with h5py.File(path, "w") as file:
            group = file.create_group("conv1_conv/conv1_conv")
            group["bias:0"] = np.zeros(64, np.float32)
            change(group)

    return make


def _virtual(group: h5py.Group) -> None:
    layout = h5py.VirtualLayout((1 << 40,), np.float32)
    layout[:64] = h5py.VirtualSource("elsewhere.h5", "x", (64,))
    group.create_virtual_dataset("kernel:0", layout)


def _many(group: h5py.Group) -> None:
    group["kernel:0"] = np.zeros(1 << 20, np.float32)
    for i in range(1000):
        group[f"copy{i}/kernel:0"] = group["kernel:0"]  # a hard link: the same 4 MiB again


def _deep(group: h5py.Group) -> None:
    for _ in range(20):
        group = group.create_group("in")
    group["kernel:0"] = np.zeros(4, np.float32)


def _loop(group: h5py.Group) -> None:
    group["again"] = group


def _paths(group: h5py.Group) -> None:
    for _ in range(6):
        below = group.create_group("0")
        for i in range(1, 40):
            group[str(i)] = below
        group = below


def _crowded(path: Path, good: Path) -> None:
    with h5py.File(path, "w") as file:
        variables = file.create_group("layers/conv2d/vars")
        variables.attrs["name"] = "conv1"
        for i in range(3):
            variables[str(i)] = np.zeros(4, np.float32)


def _renamed(path: Path, good: Path) -> None:
    config, weights = _members(good)
    held = json.loads(config)
    held["config"]["layers"] = [layer for layer in held["config"]["layers"] if layer["class_name"] != "Dense"]
    _zip(path, json.dumps(held).encode(), weights)


def test_two_layers_of_one_name_here_are_an_error_and_not_the_last_of_them(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "two.h5", "w") as file:
        for name in ("fc10", "fc6"):
            file[f"{name}/{name}/bias:0"] = np.zeros(10, np.float32)
    with pytest.raises(reslab.WorkError, match=r"must hold each tensor once; .* has fc.bias twice, also as fc6"):
        keras_files.read_h5(tmp_path / "two.h5")


@pytest.mark.parametrize(
    "make",
    [
        lambda p, good: p.write_bytes(good.read_bytes()[:50_000]),
        lambda p, good: _zip(p, _members(good)[0], _members(good)[1][:20_000]),
        lambda p, good: _zip(p, *_members(good), zipfile.ZIP_DEFLATED),
        lambda p, good: _zip(p, b"{}", b"\0" * (1 << 28), zipfile.ZIP_DEFLATED),
        lambda p, good: _zip(p, b" " * (1 << 27), _members(good)[1], zipfile.ZIP_DEFLATED),
        lambda p, good: _zip(p, b"[" * 100_000, _members(good)[1]),
        lambda p, good: _zip(p, b"{}", _members(good)[1]),
        _renamed,
        lambda p, good: p.write_bytes(b"<html>not found</html>"),
        lambda p, good: p.write_bytes(b""),
        lambda p, good: p.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\xff" * 4000),
        lambda p, good: None,
        _old(lambda group: group.create_dataset("kernel:0", (1 << 40,), np.float32)),
        _old(lambda group: group.create_dataset("kernel:0", (1 << 40,), np.float32, chunks=(1 << 16,), compression="gzip")),
        _old(lambda group: group.create_dataset("kernel:0", data=np.zeros(1 << 20, np.float32), compression="gzip")),
        _old(lambda group: group.create_dataset("kernel:0", (64,), np.float32, external=[("/etc/passwd", 0, 256)])),
        _old(lambda group: group.create_dataset("kernel:0", data=np.zeros(64, np.int32))),
        _old(lambda group: group.create_dataset("kernel:0", data=["text"], dtype=h5py.string_dtype())),
        _old(lambda group: group.__setitem__("kernel:0", h5py.ExternalLink("elsewhere.h5", "x"))),
        _old(lambda group: group.__setitem__("kernel:0", h5py.SoftLink("/conv1_conv/conv1_conv/bias:0"))),
        _old(_virtual),
        _old(_many),
        _old(_deep),
        _old(_loop),
        _old(_paths),
        _crowded,
    ],
    ids=[
        "truncated", "truncated inside", "compressed", "bomb", "bomb of a config", "deep json", "no layers", "a layer without a name", "html", "empty", "noise",
        "missing", "lying shape", "lying shape in chunks", "compressed array", "kept in another file", "integers", "text", "external link", "soft link",
        "virtual", "many names for one array", "deep", "in a circle", "40^6 paths", "more variables than its class has",
    ],
)  # fmt: skip
def test_what_no_weights_file_of_keras_holds_is_one_line_and_little_memory(
    make: Callable[[Path, Path], None], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras_files, "MOST_MEMBERS", 2000)  # so that the last of them is soon there
    bad = tmp_path / "bad"
    make(bad, good)
    tracemalloc.start()
    try:
        with pytest.raises(reslab.WorkError, match="cannot be read as weights of Keras") as caught:
            read_h5(bad)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_files_of_keras_are_recognised_by_content(good: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "net.keras")
    (tmp_path / "net.h5").write_text("text")
    assert is_keras(good)
    assert not any(is_keras(tmp_path / name) for name in ("net.keras", "net.h5", "missing"))
