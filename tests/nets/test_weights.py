import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

import reslab
from reslab.data.images import Images


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


class _Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploited"),))  # type: ignore[return-value]


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
    ],
    ids=["html", "exploit", "truncated", "empty", "lying header", "a list", "deeper", "wider", "grey", "nan", "missing"],
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
