"""What the tests of the server share: a small finished run, image files, and a server as a process of its own."""

import http.client
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

from reslab.data.preprocess import Preprocess
from reslab.nets.torch import ResNet
from reslab.spec import Spec
from reslab.use.artefact import TorchModel, save
from reslab.use.classifier import Classifier
from tests.conftest import scramble

CLASSES = ("red <b>&", "green", "blue")
SIZE, CANVAS = 24, 28


def make_run(path: Path) -> Path:
    """A run folder with a net of random weights, which is as good as any for serving it."""
    net = scramble(ResNet(Spec("basic", (1, 1), (8, 16), "conv3", num_classes=3)), seed=3)
    assert isinstance(net, ResNet)
    preprocess = Preprocess(SIZE, CANVAS, 3, np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32))
    save(Classifier(TorchModel(net.eval(), preprocess), CLASSES, 1.0, 0.6), path / "model")
    (path / "run.toml").write_text(tomli_w.dumps({"net": "resnet8", "data": {"name": "colours"}}))
    test = {"kind": "test", "time": 1.0, "n": 36, "top1": 0.9, "top1_low": 0.8, "top1_high": 0.95, "classes": []}
    (path / "log.jsonl").write_text(json.dumps(test) + "\n")
    (path / "report.html").write_text("<!doctype html><html lang=en><title>Report</title><style>p{color:red}</style><p>the report</p></html>")
    return path


def image(seed: int = 0, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    """An image file of blotches."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


class Server:
    """A running `reslab serve`."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self.process, self.port = process, port

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def predict(self, body: bytes, kind: str = "image/png") -> tuple[int, dict[str, str], bytes]:
        return self.ask("POST", "/predict", body, Content_Type=kind)

    def metric(self, name: str) -> float:
        text = self.ask("GET", "/metrics")[2].decode()
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"reslab_{name} "))

    def resident(self) -> float:
        """MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def serving(model: Path, *options: str, **environment: str) -> Iterator[Server]:
    """`reslab serve` on a free port, ended with SIGTERM if it still runs."""
    command = [sys.executable, "-m", "reslab", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stdout and process.stderr
    try:
        line = process.stdout.readline()
        assert "serving" in line, line + process.stderr.read()
        yield Server(process, int(line.partition("127.0.0.1:")[2].split()[0]))
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
        process.stdout.close()
        process.stderr.close()


def multipart(*files: tuple[str, bytes]) -> tuple[bytes, str]:
    """A form with these files, and its content type."""
    parts = [f'--xyz\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode() + body + b"\r\n" for name, body in files]
    return b"".join(parts) + b"--xyz--\r\n", "multipart/form-data; boundary=xyz"


def as_json(body: bytes) -> Any:
    return json.loads(body)
