"""The artefact of a run: the folder `model/` with FILES."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reslab.data.decode import Pixels
from reslab.data.preprocess import Preprocess
from reslab.errors import CallError, WorkError, shown
from reslab.nets.identify import COUNTER, state_shapes
from reslab.nets.torch import ResNet
from reslab.nets.values import flaw
from reslab.run import shipped, write_whole
from reslab.spec import Spec
from reslab.tensors import read_tensors, write_tensors
from reslab.use.classifier import Classifier, Logits
from reslab.use.inference import Quick, weigh

FILES = ("spec.json", "weights.safetensors", "classes.json", "preprocess.json", "calibration.json", "inference.json")


@dataclass(frozen=True)
class TorchModel:
    """A torch net and its preprocessing, as a Classifier's Model."""

    net: ResNet
    preprocess: Preprocess
    inference: dict[str, Any] = field(default_factory=dict)  # what `weigh` found of it
    _quick: Quick = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_quick", Quick(self.net, self.inference))  # now, for the record is of the weights as they are

    @property
    def spec(self) -> Spec:
        """What the net is."""
        return self.net.spec

    @torch.no_grad()
    def logits(self, pixels: Pixels) -> Logits:
        """uint8 (N, canvas, canvas, C) -> (N, classes), in fp32 on the device the net is on."""
        self.net.eval()
        return self._answered(self.net(self._fed(pixels)).float())

    @torch.no_grad()
    def quick(self, pixels: Pixels) -> Logits:
        """`logits` by the folded net; in bf16 or int8, which round more, where `inference` allows it and it is faster."""
        return self._answered(self._quick(self._fed(pixels)))

    def weighed(self, pixels: Iterable[Pixels], training: Iterable[Pixels]) -> "TorchModel":
        """The same, knowing whether bf16 and int8 give the images in `pixels`, batches of them, fp32's classes; int8's ranges are of `training`."""
        return replace(self, inference=weigh(self.net, map(self._fed, pixels), map(self._fed, training), self.preprocess.answer))

    def _fed(self, pixels: Pixels) -> Tensor:
        raw = torch.from_numpy(np.require(pixels, requirements=("C", "W")))  # a copy where torch could not take it
        x = self.preprocess.views(self.preprocess(raw, next(self.net.parameters()).device))
        return x.contiguous(memory_format=torch.channels_last)

    def _answered(self, logits: Tensor) -> Logits:
        out: Logits = self.preprocess.answer(logits).cpu().numpy()
        return out


def save(classifier: Classifier, folder: Path, calibration: dict[str, Any] | None = None) -> None:
    """Writes the artefact; `calibration` are facts to keep beside the temperature."""
    model = classifier.model
    assert isinstance(model, TorchModel)
    write_tensors(folder / "weights.safetensors", model.net.state_dict())
    for name, value in (
        ("classes", classifier.classes),
        ("preprocess", model.preprocess.to_dict()),
        ("calibration", {"temperature": classifier.temperature, "sure": classifier.sure, **(calibration or {})}),
        ("inference", model.inference),
        ("spec", asdict(model.spec)),  # last: where it is, all is
    ):
        write_whole(folder / f"{name}.json", json.dumps(value, indent=1).encode())


def model_folder(path: Path) -> Path:
    """Where the artefact is: `model/` in a run folder, or the folder itself. Raises CallError when it is in neither."""
    folder = path / "model" if (path / "model").is_dir() else path
    if not (folder / "spec.json").is_file():
        unfinished = (path / "run.toml").is_file()
        own = f", or one of {', '.join(shipped())}" if shipped() else ""
        fix = f"finish it with `reslab train --resume {shown(path)}`" if unfinished else f"give the folder that `reslab train` wrote{own}"
        raise CallError(f"a finished run has model/spec.json; {shown(path)} has not: {fix}")
    return folder


def model_files(path: Path) -> list[Path]:
    """The files of the artefact that there are; older runs have no inference.json. Raises CallError like `model_folder`."""
    return [file for name in FILES if (file := model_folder(path) / name).is_file()]


def read_folder(path: Path) -> tuple[TorchModel, dict[str, Any]]:
    """The model, and the classes, temperature and sure that lie beside it. Raises CallError or WorkError."""
    folder = model_folder(path)
    held = {name: _json(folder / f"{name}.json") for name in ("spec", "classes", "preprocess", "calibration")}
    try:
        spec, preprocess = Spec.from_dict(held["spec"]), Preprocess.from_dict(held["preprocess"])
        if preprocess.channels != spec.in_channels:
            raise CallError(f"its net takes images of {spec.in_channels} channels, and its preprocessing gives {preprocess.channels}")
        spec.check_size(preprocess.image_size)
        facts = {**held["calibration"], "classes": held["classes"]}
    except (CallError, TypeError, ValueError) as error:
        raise WorkError(f"the model in {shown(folder)} is damaged: {shown(str(error))}") from error
    inference = _inference(folder)
    return TorchModel(_net(spec, folder), preprocess, inference), facts


def _inference(folder: Path) -> dict[str, Any]:
    """What `weigh` found of the model; nothing in older runs."""
    held = _json(folder / "inference.json") if (folder / "inference.json").exists() else {}
    parts = [held, *(held.get(name, {}) for name in ("bf16", "int8"))] if isinstance(held, dict) else [None]
    shares = [part.get(key, 0) if isinstance(part, dict) else "" for part in parts for key in ("agreement", "agreement_low", "exchanged")]
    if not all(isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1 for share in shares):
        raise WorkError(f"the model in {shown(folder)} is damaged: inference.json must hold agreements from 0 to 1; delete it to predict without it")
    return held


def _net(spec: Spec, folder: Path) -> ResNet:
    """The net with the weights that lie in a folder. No memory is taken for what the spec claims and they have not."""
    weights, _ = read_tensors(folder / "weights.safetensors")
    another = f"the weights in {shown(folder)} are of another net than its spec.json"
    if {name: tuple(tensor.shape) for name, tensor in weights.items() if not name.endswith(COUNTER)} != state_shapes(spec):
        raise WorkError(another)
    net = ResNet(spec)
    for name, own in net.state_dict().items():
        if name in weights and (wrong := flaw(name, weights[name], own)):
            raise WorkError(f"the weights in {shown(folder)} are damaged: {name} {wrong}")
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise WorkError(another) from error
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net.eval()


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WorkError(f"{shown(file)} cannot be read: {shown(str(error))[:120]}") from error
