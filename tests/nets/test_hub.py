import hashlib
import http.client
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import reslab
from reslab import download
from reslab.nets.hub import locate
from reslab.nets.saving import save_weights


class Server:
    """Serves `body` under every path; `/away` redirects to plain http, `/on` to another path."""

    def __init__(self, body: bytes) -> None:
        self.body, self.asked = body, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                target = {"/away.safetensors": f"http://{outer.host}/b.safetensors", "/on.safetensors": f"https://{outer.host}/b.safetensors"}.get(self.path)
                self.send_response(302 if target else 200)
                if target:
                    self.send_header("Location", target)
                self.send_header("Content-Length", str(0 if target else len(outer.body)))
                self.end_headers()
                self.wfile.write(b"" if target else outer.body)

            def log_message(self, *arguments: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.http.server_port}"
        threading.Thread(target=partial(self.http.serve_forever, 0.05), daemon=True).start()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESLAB_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def net() -> reslab.nets.torch.ResNet:  # type: ignore[name-defined]
    torch.manual_seed(3)
    return reslab.build("resnet20")


@pytest.fixture
def server(net: Any, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    served = Server(save_weights(net, tmp_path / "net.safetensors").read_bytes())
    # https as it is spoken, but for the encryption, which needs a certificate
    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open", lambda self, request: self.do_open(http.client.HTTPConnection, request))
    yield served
    served.http.shutdown()
    served.http.server_close()


def test_a_url_is_fetched_once_and_then_kept(server: Server, net: Any) -> None:
    url = f"https://{server.host}/models/net.safetensors"
    for _ in range(2):
        again = reslab.build("resnet20")
        assert reslab.load_weights(again, url).dialect == "torchvision"
        assert torch.equal(again.fc.weight, net.fc.weight)
    assert server.asked == 1


def test_a_kept_file_that_changed_is_noticed(server: Server) -> None:
    url = f"https://{server.host}/net.safetensors"
    file = locate(url)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(reslab.WorkError, match=r"must have SHA-256 [0-9a-f]{64}; it has .*remove it"):
        locate(url)


def test_a_given_checksum_decides(server: Server) -> None:
    right = hashlib.sha256(server.body).hexdigest()
    assert locate(f"https://{server.host}/a.safetensors#sha256={right}").read_bytes() == server.body
    with pytest.raises(reslab.WorkError, match=r"b.safetensors must have SHA-256 0{64}; what came had .* was removed"):
        locate(f"https://{server.host}/b.safetensors#sha256={'0' * 64}")
    assert locate(f"https://{server.host}/b.safetensors").is_file(), "another try is free to succeed"


def test_digits_in_a_name_are_a_checksum_as_torchvision_publishes_them(server: Server) -> None:
    right = hashlib.sha256(server.body).hexdigest()[:8]
    assert locate(f"https://{server.host}/net-{right}.safetensors").is_file()
    with pytest.raises(reslab.WorkError, match="must have SHA-256 0123456a; what came had"):
        locate(f"https://{server.host}/net-0123456a.safetensors")
    assert locate(f"https://{server.host}/net-20251231.safetensors").is_file(), "a date is none"


def test_a_redirect_may_not_leave_https(server: Server) -> None:
    assert locate(f"https://{server.host}/on.safetensors").is_file()
    with pytest.raises(reslab.WorkError, match="redirects from https to http"):
        locate(f"https://{server.host}/away.safetensors")


def test_a_file_beyond_all_bounds_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    with pytest.raises(reslab.WorkError, match="it has over"):
        locate(f"https://{server.host}/net.safetensors")
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_offline_says_what_to_put_where_and_it_is_used(server: Server, home: Path) -> None:
    server.http.shutdown()
    server.http.server_close()
    url = f"https://{server.host}/net.safetensors"
    with pytest.raises(reslab.WorkError, match=f"net.safetensors is needed and could not be downloaded .*: put {url} into {home}") as caught:
        locate(url)
    folder = Path(str(caught.value).rpartition(" into ")[2])
    (folder / "net.safetensors").write_bytes(server.body)
    assert reslab.load_weights(reslab.build("resnet20"), url).tensors == 116


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://a.org/net.pth", "come over https"),
        ("file:///etc/passwd", "come over https"),
        ("https://a.org/", "from the URL of a file"),
        ("https://a.org/net.pth#sha256=12", "64 hexadecimal digits"),
        ("https://a.org/net.pth#md5=12", "64 hexadecimal digits"),
        ("hf:name", "written hf:owner/name"),
        ("hf:../../etc/passwd", "written hf:owner/name"),
        ("hf:a/b/../../c", "written hf:owner/name"),
    ],
)
def test_a_source_that_is_written_wrongly_is_said(source: str, message: str, home: Path) -> None:
    with pytest.raises(reslab.CallError, match=message) as caught:
        reslab.load_weights(reslab.build("resnet20"), source)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path) -> Iterator[dict[str, Path | Exception]]:
    """The hub's client with a repository of ours behind it: file name -> file."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    files: dict[str, Path | Exception] = {}

    def metadata(url: str, timeout: float) -> SimpleNamespace:
        held = files.get(url.rpartition("/")[2])
        if isinstance(held, Exception):
            raise held
        if held is None:
            raise huggingface_hub.errors.EntryNotFoundError("404")
        return SimpleNamespace(size=held.stat().st_size)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name, revision: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, revision: str(files[name]))
    yield files


def test_a_repository_gives_its_safetensors_and_its_config_is_heard(hub: dict[str, Any], tmp_path: Path) -> None:
    file = save_weights(reslab.build("resnet18_blur"), tmp_path / "repository", "timm")
    hub |= {"model.safetensors": file, "config.json": file.with_name("config.json")}
    assert reslab.load_weights(reslab.build("resnet18_blur"), "hf:owner/name@main").tensors == 122
    with pytest.raises(reslab.CallError, match="which is resnet18_blur here"):
        reslab.load_weights(reslab.build("resnet18"), "hf:owner/name")


def test_a_repository_without_safetensors_gives_its_torch_file(hub: dict[str, Any], tmp_path: Path) -> None:
    torch.save(reslab.build("resnet20").state_dict(), tmp_path / "pytorch_model.bin")
    hub["pytorch_model.bin"] = tmp_path / "pytorch_model.bin"
    assert reslab.load_weights(reslab.build("resnet20"), "hf:owner/name").tensors == 116
    with pytest.raises(reslab.WorkError, match=r"has a.pth; owner/name has not"):
        locate("hf:owner/name/a.pth")


def test_without_a_network_a_file_put_by_hand_is_used(hub: dict[str, Any], home: Path, net: Any, tmp_path: Path) -> None:
    hub["model.safetensors"] = ConnectionError("no route\nto host")
    with pytest.raises(reslab.WorkError, match=r"model.safetensors of owner/name is needed and could not be fetched \(no route to host\): put http") as caught:
        locate("hf:owner/name")
    assert "\n" not in str(caught.value)
    folder = Path(str(caught.value).rpartition(" into ")[2])
    save_weights(net, folder / "model.safetensors")
    assert locate("hf:owner/name") == folder / "model.safetensors"


def test_a_repository_of_something_huge_is_refused(hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reslab.nets.hub.MAX_BYTES", 10)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 11)
    hub["model.safetensors"] = tmp_path / "model.safetensors"
    with pytest.raises(reslab.WorkError, match="of owner/name has 11 bytes"):
        locate("hf:owner/name")


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(reslab.WorkError, match=r"pip install 'reslab\[hub\]'"):
        locate("hf:owner/name")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://exämple.org/net.pth", "written in ASCII; received https://exämple.org/net.pth: write other letters as %XX"),
        ("https://a.org/ä.pth", "written in ASCII"),
        ("https://[::1/net.pth", "names a host"),
        ("https:///net.pth", "names a host"),
        ("https://a..org/net.pth", "names a host"),
        ("https://a.org:99999/net.pth", "names a host, and a port where it has one"),
        ("hf:owner/" + "a" * 300, "written hf:owner/name"),
        ("a" * 300, "weights must be a file; a+ is not one"),
        ("a\0b", r"weights must be a file; a\\x00b is not one"),
    ],
    ids=["host", "letters", "brackets", "no host", "empty label", "port", "repository", "long path", "null"],
)
def test_a_source_that_cannot_be_is_a_wrong_call(source: str, message: str, home: Path) -> None:
    with pytest.raises(reslab.CallError, match=message) as caught:
        reslab.load_weights(reslab.build("resnet20"), source)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_too_long_for_a_disk_is_cut_and_its_checksum_counts(server: Server) -> None:
    right = hashlib.sha256(server.body).hexdigest()[:8]
    file = locate(f"https://{server.host}/{'a' * 300}-{right}.safetensors")
    assert file.read_bytes() == server.body and file.name.endswith(f"a-{right}.safetensors")
    with pytest.raises(reslab.WorkError, match="must have SHA-256 0123456a; what came had"):
        locate(f"https://{server.host}/{'a' * 300}-0123456a.safetensors")
