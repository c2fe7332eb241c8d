"""What the benchmarks of the server share: a model to serve, and `reslab serve` as a process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen


class Server(NamedTuple):
    process: "subprocess.Popen[str]"
    port: int

    def resident(self) -> float:
        """MiB of memory that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def metrics(self) -> dict[str, float]:
        lines = urlopen(f"http://127.0.0.1:{self.port}/metrics").read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


@contextlib.contextmanager
def serve(model: Path, *options: str, **environment: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "reslab", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stdout
    try:
        line = process.stdout.readline()
        assert "serving" in line, line
        yield Server(process, int(line.partition("127.0.0.1:")[2].split()[0]))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def load(port: int, connections: int, seconds: float, rate: float | None = None) -> dict[str, Any]:
    """What benchmarks/load.py measured, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("load.py")), str(port), str(connections), str(seconds)]
    done = subprocess.run([*command, str(rate)] if rate else command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def model(folder: Path, net: str = "resnet20") -> Path:
    """The run named on the command line, or an untrained net: what is measured does not depend on its weights."""
    given = [Path(word) for word in sys.argv[1:] if not word.startswith("--")]
    if given:
        return given[0]
    import numpy as np
    import torch

    import reslab
    from reslab.data.preprocess import Preprocess
    from reslab.use.artefact import TorchModel, save
    from reslab.use.classifier import Classifier

    torch.manual_seed(0)
    classes = tuple(f"class {i}" for i in range(10))
    preprocess = Preprocess(32, 32, 3, np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32))
    save(Classifier(TorchModel(reslab.build(net, num_classes=10).eval(), preprocess), classes), folder / "model")
    return folder / "model"
