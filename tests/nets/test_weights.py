import json
import pickle
import struct
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

import reslab
from reslab.data.images import Images
from reslab.nets.configs import Inputs
from reslab.nets.saving import save_weights
from reslab.nets.weights import identify, stem_of
from tests.conftest import relative, scramble
from tests.nets.peers import differences, loaded, make, undrawn

# Every structure once; the others, which are wider or deeper, are in benchmarks/weights_parity.py.
PEERS = [
    *(("torchvision", row) for row in ("resnet18", "resnet50", "resnext50_32x4d")),
    *(("timm", row) for row in ("resnet26", "resnet50c", "resnet18d", "resnet26d", "resnext50d_32x4d", "resnet50_gn", "resnetrs50")),
    *(("timm", row) for row in ("se_resnet18", "se_resnet50", "se_resnext26d_32x4d", "resnet18_blur", "resnet50_blur", "resnet50d_blur", "preact_resnet50")),
    *(("transformers", row) for row in ("resnet18", "resnet26", "resnet50_v1")),
]


@pytest.mark.parametrize(("name", "file", "wrong"), [("resnet20", "resnet20-12fca82f.th", 827), ("resnet32", "resnet32-d509ac18.th", 737)])
def test_published_cifar_weights_score_exactly_what_their_author_states(cifar: Images, published: Path, name: str, file: str, wrong: int) -> None:
    net = reslab.build(name).eval().to(memory_format=torch.channels_last)
    loaded = reslab.load_weights(net, published / file)
    assert loaded.dialect == "akamaster"
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # its author normalises as ImageNet
    assert cifar.array is not None
    errors = 0
    with torch.inference_mode():
        for start in range(50_000, 60_000, 500):
            x = (torch.from_numpy(cifar.array[start : start + 500]).float() / 255 - mean) / std
            errors += int((net(x.permute(0, 3, 1, 2)).argmax(1) != torch.from_numpy(cifar.labels[start : start + 500])).sum())
    assert errors == wrong


@pytest.mark.parametrize(("library", "row"), PEERS, ids=str)
def test_weights_of_peers_give_their_logits_and_stages(library: str, row: str) -> None:
    theirs = make(library, row)
    ours, told = loaded(theirs, row)
    assert told.tensors == len(ours.state_dict())
    for size in (64, 97):
        assert max(differences(theirs, ours, size).values()) < 1e-4
    with torch.no_grad():
        ours.layer3[1].conv2.weight[0] *= -1
    assert differences(theirs, ours, 64)["logits"] > 1e-4, "one corrupted filter must be noticed"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "net.pth"
    torch.save(reslab.build("resnet18").state_dict(), path)
    return path


def test_torchvision_names_load_strictly(saved: Path) -> None:
    net = reslab.build("resnet18")
    loaded = reslab.load_weights(net, saved)
    assert (loaded.dialect, loaded.head_replaced) == ("torchvision", "")
    assert torch.equal(net.layer4[1].conv2.weight, torch.load(saved)["layer4.1.conv2.weight"])


def test_wrappers_and_safetensors_are_recognised(saved: Path, tmp_path: Path) -> None:
    held = torch.load(saved)
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in held.items()}}, tmp_path / "wrapped.pth")
    safetensors.torch.save_file(held, tmp_path / "net.bin")
    for file in ("wrapped.pth", "net.bin"):
        net = reslab.build("resnet18")
        reslab.load_weights(net, tmp_path / file)
        assert all(torch.equal(v, held[k]) for k, v in net.state_dict().items())


def test_another_class_count_replaces_the_head_and_says_so(saved: Path) -> None:
    net = reslab.build("resnet18", num_classes=7)
    own = net.fc.weight.clone()
    loaded = reslab.load_weights(net, saved)
    assert "1000 classes, this net 7" in str(loaded)
    assert torch.equal(net.fc.weight, own)
    assert torch.equal(net.conv1.weight, torch.load(saved)["conv1.weight"])


@pytest.mark.parametrize("wrapper", ["state_dict_ema", "model_ema"])
def test_an_average_is_preferred_and_said(wrapper: str, saved: Path) -> None:
    held = torch.load(saved)
    average = {f"module.{name}": tensor * 0 if tensor.is_floating_point() else tensor for name, tensor in held.items()}
    torch.save({"state_dict": held, wrapper: {"n_averaged": torch.tensor(7), **average}, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, saved)
    net = reslab.build("resnet18")
    assert f"the average in {wrapper}" in str(reslab.load_weights(net, saved))
    assert not net.layer4[1].conv2.weight.any()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.", "module._orig_mod.model."])
def test_prefixes_are_taken_off(prefix: str, saved: Path) -> None:
    held = torch.load(saved)
    torch.save({"model": {prefix + name: tensor for name, tensor in held.items()}}, saved)
    net = reslab.build("resnet18")
    reslab.load_weights(net, saved)
    assert all(torch.equal(v, held[k]) for k, v in net.state_dict().items())


def test_half_precision_views_and_legacy_files_load(saved: Path) -> None:
    held = torch.load(saved)
    flat = torch.cat([tensor.flatten().double() for tensor in held.values()]).float()
    views, start = {}, 0
    for name, tensor in held.items():
        views[name] = flat[start : start + tensor.numel()].view(tensor.shape) if tensor.is_floating_point() else tensor
        start += tensor.numel()
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in held.items()}
    for content, legacy in ((views, False), (views, True), (halves, False)):
        torch.save(content, saved, _use_new_zipfile_serialization=not legacy)
        net = reslab.build("resnet18")
        reslab.load_weights(net, saved)
        assert all(torch.equal(v, content[k].to(v.dtype)) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("row", "dialect"),
    [
        *(("resnet50", "torchvision"), ("resnet50_v1", "huggingface"), ("resnet18", "huggingface"), ("preact_resnet50", "timm"), ("resnet18d", "timm")),
        *(("resnet20", "akamaster"), ("resnet110_fixup", "ours"), ("skipblock8", "ours"), ("resnet110_exclusive_gate", "ours")),
    ],
)
def test_what_goes_out_comes_back_exactly(row: str, dialect: str, tmp_path: Path) -> None:
    net = scramble(reslab.build(row, num_classes=11))
    file = save_weights(net, tmp_path / ("folder" if dialect in ("huggingface", "timm") else "net.safetensors"), dialect)
    with undrawn():
        back = reslab.build(row, num_classes=11)
    told = reslab.load_weights(back, file.parent if dialect in ("huggingface", "timm") else file)
    assert told.head_replaced == ""
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in back.state_dict().items())
    assert row in identify(file).nets
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(("row", "changes"), [("resnet18", {}), ("resnet50_v1", {"num_classes": 5}), ("resnet26", {"in_channels": 1, "num_classes": 3})])
def test_transformers_loads_what_we_save(row: str, changes: dict[str, int], transformers: ModuleType, tmp_path: Path) -> None:
    net = scramble(reslab.build(row, **changes)).eval()
    channels = net.spec.in_channels
    save_weights(net, tmp_path, "huggingface", Inputs(64, (0.5,) * channels, (0.2,) * channels, classes=tuple(f"c{i}" for i in range(net.spec.num_classes))))
    theirs, told = transformers.ResNetForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert theirs.config.id2label[2] == "c2"
    x = torch.randn(2, channels, 64, 64)
    with torch.no_grad():
        assert relative(theirs.eval()(x).logits, net(x)) < 1e-4


@pytest.mark.parametrize(("row", "changes"), [("resnet18d", {}), ("se_resnet18", {"in_channels": 1}), ("preact_resnet50", {}), ("resnet18_blur", {})])
def test_timm_loads_what_we_save_and_knows_its_images(row: str, changes: dict[str, int], timm: ModuleType, tmp_path: Path) -> None:
    net = scramble(reslab.build(row, num_classes=9, **changes)).eval()
    channels = net.spec.in_channels
    save_weights(net, tmp_path, "timm", Inputs(96, (0.5,) * channels, (0.2,) * channels, "bicubic", 0.9))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    expected = timm.data.resolve_model_data_config(theirs)
    assert (tuple(expected["input_size"]), expected["mean"], expected["interpolation"]) == ((channels, 96, 96), [0.5] * channels, "bicubic")
    assert (expected["crop_pct"], theirs.num_classes, theirs.num_features) == (0.9, 9, json.loads((tmp_path / "config.json").read_text())["num_features"])
    x = torch.randn(2, channels, 96, 96)
    with torch.no_grad():
        assert relative(theirs(x), net(x)) < 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: save_weights(reslab.build("resnet18"), p / "net.pth"), "one .safetensors file; received .*net.pth"),
        (lambda p: save_weights(reslab.build("resnet18"), p / "a.file", "timm"), "are a folder; .*a.file is a file"),
        (lambda p: save_weights(reslab.build("resnet18", in_channels=1), p / "x", "timm"), "one mean and std for each of 1 channels"),
        (lambda p: save_weights(reslab.build("resnet18"), p / "x", "huggingface", Inputs(classes=("a", "a"))), "one name for each of 1000 classes"),
        (lambda p: save_weights(reslab.build("resnet18", depths=(1, 1, 1, 1)), p / "x", "timm"), "this net is none"),
        (lambda p: save_weights(torch.nn.Linear(2, 2), p / "x.safetensors"), "net that reslab built; received a Linear"),  # type: ignore[arg-type]
    ],
    ids=["suffix", "a file", "channels", "classes", "architecture", "a stranger"],
)
def test_a_wrong_call_writes_nothing(call: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.file").touch()
    with pytest.raises(reslab.CallError, match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.file"]


@pytest.mark.parametrize(
    ("saved_as", "dialect", "into", "message"),
    [
        ("resnet50_v1", "huggingface", "resnet50", "downsample_in_bottleneck is True, and in this net it is False"),
        ("resnet18_blur", "timm", "resnet18", "architecture is timm's resnetblur18, which is resnet18_blur here"),
    ],
)
def test_a_config_is_heard_where_shapes_cannot_tell(saved_as: str, dialect: str, into: str, message: str, tmp_path: Path) -> None:
    save_weights(reslab.build(saved_as), tmp_path, dialect)
    with pytest.raises(reslab.CallError, match=message):
        reslab.load_weights(reslab.build(into), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "resnetaa18", "downsample_in_bottleneck": "\x1b[31m"}))
    with pytest.raises(reslab.CallError, match=r"which no row of the family is known to be|is \\x1b.31m"):
        reslab.load_weights(reslab.build(into), tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(reslab.WorkError, match=r"config.json beside weights must be a JSON object"):
        reslab.load_weights(reslab.build(into), tmp_path)


def test_a_mismatch_names_dialect_keys_and_the_nets_that_fit(tmp_path: Path) -> None:
    save_weights(reslab.build("resnet34", num_classes=5), tmp_path, "huggingface")
    with pytest.raises(reslab.CallError) as caught:
        reslab.load_weights(reslab.build("resnet18"), tmp_path)
    told = str(caught.value)
    assert "(huggingface names)" in told
    assert "first unexpected resnet.encoder.stages.0.layers.2.layer.0.convolution.weight" in told
    assert told.endswith("its tensors fit resnet34 with 5 classes")


def test_the_stem_of_a_file_is_told(tmp_path: Path) -> None:
    for row, kernels in (("resnet18", (7,)), ("resnet20", (3,)), ("resnet18d", (3, 3, 3))):
        with undrawn():
            file = save_weights(reslab.build(row), tmp_path / f"{row}.safetensors")
        assert stem_of(file) == (3, kernels)


class _Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploited"),))  # type: ignore[return-value]


class _Lie:
    """Pickles as a tensor whose size and strides its storage of one element does not have."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.size, self.stride = size, stride

    def __reduce_ex__(self, protocol: Any) -> Any:
        storage = torch.storage.TypedStorage(wrap_storage=torch.zeros(1).untyped_storage(), dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.size, self.stride, False, {})


class _Big:
    def __reduce__(self) -> Any:
        return bytearray, (1 << 40,)


def _lying(size: tuple[int, ...], stride: tuple[int, ...], legacy: bool) -> Any:
    def make_file(path: Path, saved: Path) -> None:
        torch.save({"conv1.weight": _Lie(size, stride)}, path, _use_new_zipfile_serialization=not legacy)

    return make_file


def _deflated(path: Path, saved: Path) -> None:
    with zipfile.ZipFile(saved) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, bytes(entry.file_size))


def _lying_directory(path: Path, saved: Path) -> None:
    """The zip's own list of contents claims 3 GiB for one of them."""
    data = bytearray(saved.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 3 << 30)
    path.write_bytes(data)


def _lying_safetensors(path: Path, saved: Path) -> None:
    header = json.dumps({"conv1.weight": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def _cyclic(path: Path, saved: Path) -> None:
    loop: list[Any] = [torch.zeros(1)]
    loop += [loop, loop]
    torch.save({"state_dict": {"a": loop}}, path)


def _sparse(path: Path, saved: Path) -> None:
    torch.save({"conv1.weight": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (1 << 30, 1 << 30), check_invariants=True)}, path)


def _truncated(path: Path, saved: Path) -> None:
    path.write_bytes(saved.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p, s: p.write_text("<!doctype html><title>404</title>"), reslab.WorkError, "is a web page"),
        (lambda p, s: p.write_bytes(pickle.dumps({"fc.weight": _Exploit()})), reslab.WorkError, "could run code"),
        (_truncated, reslab.WorkError, "cannot be read as weights"),
        (lambda p, s: p.write_bytes(b""), reslab.WorkError, "cannot be read as weights"),
        (lambda p, s: p.write_bytes(b"\xff" * 8 + b"{" + b"x" * 50), reslab.WorkError, "cannot be read as weights"),
        (lambda p, s: torch.save([1, 2], p), reslab.WorkError, "holds named tensors"),
        (
            lambda p, s: torch.save(reslab.build("resnet34").state_dict(), p),
            reslab.CallError,
            "another net's weights: first unexpected layer1.2",
        ),
        (lambda p, s: torch.save(reslab.build("resnet50").state_dict(), p), reslab.CallError, "another net's weights: first"),
        (
            lambda p, s: torch.save(reslab.build("resnet18", in_channels=1).state_dict(), p),
            reslab.CallError,
            r"conv1.weight is \(64, 1, 7, 7\)",
        ),
        (lambda p, s: torch.save(torch.load(s) | {"bn1.bias": torch.full((64,), float("nan"))}, p), reslab.WorkError, "not finite"),
        (lambda p, s: None, reslab.CallError, "must be a file"),
        (lambda p, s: torch.save({"conv1.weight": _Big()}, p), reslab.WorkError, "holds a bytearray"),
        (_lying((1 << 20, 1 << 20), (1 << 20, 1), legacy=False), reslab.WorkError, r"claims a tensor of 4398046511104"),
        (_lying((1 << 20, 1 << 20), (1 << 20, 1), legacy=True), reslab.WorkError, r"claims a tensor of 4398046511104"),
        (_lying((1 << 20, 1 << 20), (0, 0), legacy=False), reslab.CallError, "holds another net's weights: first missing"),
        (_deflated, reslab.WorkError, "must hold its tensors as they are"),
        (_lying_directory, reslab.WorkError, "and unpacks to"),
        (_lying_safetensors, reslab.WorkError, "cannot be read as weights"),
        (_cyclic, reslab.WorkError, "holds named tensors"),
        (_sparse, reslab.WorkError, "holds dense tensors"),
        (lambda p, s: torch.save(torch.load(s) | {"module.bn1.bias": torch.zeros(64)}, p), reslab.WorkError, "has bn1.bias twice"),
    ],
    ids=[
        *("html", "exploit", "truncated", "empty", "lying header", "a list", "deeper", "wider", "grey", "nan", "missing"),
        *("bytearray", "lying size", "lying legacy size", "expanded", "deflated", "lying directory", "lying safetensors", "cyclic", "sparse", "twice"),
    ],
)
def test_bad_weights_are_one_line_and_change_nothing(make, error, message: str, saved: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.pth"
    make(bad, saved)
    net = reslab.build("resnet18")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(error, match=message) as caught:
        reslab.load_weights(net, bad)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploited").exists()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_variance_below_zero_is_refused(saved: Path) -> None:
    held = torch.load(saved)
    held["layer1.0.bn2.running_var"][3] = -1
    torch.save(held, saved)
    with pytest.raises(reslab.WorkError, match=r"layer1.0.bn2.running_var holds variances below zero; get the file again"):
        reslab.load_weights(reslab.build("resnet18"), saved)


def _tuples(levels: int, last: bytes) -> bytes:
    """A pickle of tuples that hold the one before twice, and of what is done with the last one."""
    return b"\x80\x02})q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(levels)) + last + b"."


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("last", [b"K\x01s", b"0" + 40 * b"h\x05K\x01s"], ids=["a key", "a small one forty times"])
def test_tuples_in_tuples_are_refused_before_anything_is_made_of_them(zipped: bool, last: bytes, tmp_path: Path) -> None:
    """With sixty levels instead of twenty, the key would keep torch busy for ever."""
    file, pickled = tmp_path / "bad.pth", _tuples(20 if last[:1] == b"K" else 5, last)
    file.write_bytes(pickled)
    if zipped:
        torch.save({}, tmp_path / "empty.pth")
        with zipfile.ZipFile(tmp_path / "empty.pth") as whole, zipfile.ZipFile(file, "w") as forged:
            for entry in whole.infolist():
                forged.writestr(entry.filename, pickled if entry.filename.endswith("data.pkl") else whole.read(entry))
    with pytest.raises(reslab.WorkError, match="holds tuples in tuples that have more inside than the file"):
        reslab.load_weights(reslab.build("resnet20"), file)


@pytest.mark.parametrize("legacy", [False, True])
def test_tuples_that_a_checkpoint_shares_are_none_of_those(legacy: bool, tmp_path: Path) -> None:
    net, betas = reslab.build("resnet20"), (0.9, 0.99)
    groups = [{"params": [i], "betas": betas, "schedule": (betas, betas)} for i in range(65)]
    torch.save({"state_dict": net.state_dict(), "optimizer": {"param_groups": groups}}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert reslab.load_weights(reslab.build("resnet20"), tmp_path / "a.pth").tensors == 116


def test_a_truncated_file_is_no_web_page_because_of_the_length_of_its_header(tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    file.write_bytes(struct.pack("<Q", 0x3C20) + b'{"a":')
    assert file.read_bytes().lstrip().startswith(b"<")
    with pytest.raises(reslab.WorkError, match="cannot be read as weights"):
        reslab.load_weights(reslab.build("resnet20"), file)
