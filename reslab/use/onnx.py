"""An exported .onnx file as a Classifier's Model: onnxruntime and numpy, no torch.

The file holds the whole way from uint8 images to probabilities; its metadata, one JSON text, holds the spec, the class
names, the preprocessing and the calibration. It may come from anyone, so it is read as if an attacker wrote it: the
graph gets no file of this machine, and nothing is believed that was not checked.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reslab.data.decode import Pixels
from reslab.data.preprocess import Frame
from reslab.errors import CallError, WorkError, needs_extra, shown
from reslab.spec import Spec
from reslab.use.classifier import Logits

METADATA = "reslab"  # the key of the JSON text
INPUT, OUTPUTS = "images", ("probabilities", "logits")


def runtime() -> Any:
    """onnxruntime, which reports home unless told not to before its import. Raises WorkError when it is not installed."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise needs_extra("onnxruntime", "export") from error
    return onnxruntime


def session(graph: bytes) -> Any:
    """An InferenceSession on the CPU, on all cores or as many as OMP_NUM_THREADS says, as torch has it.

    Raises WorkError for what onnxruntime cannot run.
    """
    ort = runtime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is said once, by us
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
        options.intra_op_num_threads = int(threads)
    # Without VNNI the quick product of 8-bit numbers adds two of them in 16 bits, which may be too few; this one is exact there.
    options.add_session_config_entry("session.x64quantprecision", "1")
    with tempfile.TemporaryDirectory() as nothing:  # tensors kept in other files are looked for in an empty folder
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", nothing)
        try:
            return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # a forged file can raise anything
            raise WorkError(f"onnxruntime {ort.__version__} cannot run this: {shown(str(error))[:200]}") from error


@dataclass(frozen=True)
class OnnxModel:
    """A session on an exported graph, as a Classifier's Model."""

    session: Any
    spec: Spec
    preprocess: Frame

    def logits(self, pixels: Pixels) -> Logits:
        """uint8 (N, canvas, canvas, C) -> (N, classes). Raises WorkError when the graph fails or answers in another shape."""
        try:
            (out,) = self.session.run([OUTPUTS[1]], {INPUT: pixels})
        except Exception as error:
            raise WorkError(f"the exported graph failed: {shown(str(error))[:200]}") from error
        if not isinstance(out, np.ndarray) or out.shape != (len(pixels), self.spec.num_classes) or out.dtype != np.float32:
            raise WorkError(f"an exported graph answers in float32 {(len(pixels), self.spec.num_classes)}; this one in {getattr(out, 'shape', type(out))}")
        return out

    def quick(self, pixels: Pixels) -> Logits:
        """`logits`: the graph is what it is."""
        return self.logits(pixels)


def read_onnx(path: Path) -> tuple[OnnxModel, dict[str, Any]]:
    """The model, and the classes, temperature and sure that its metadata hold. Raises CallError or WorkError."""
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise CallError(f"a model must be a file that can be read; {shown(path)} is not ({error.strerror}): check the path") from error
    try:
        opened = session(graph)
        held = _metadata(opened)
        model = OnnxModel(opened, Spec.from_dict(held["spec"]), Frame(*(held["preprocess"][name] for name in ("image_size", "canvas", "channels"))))
        _check_interface(model)
    except (WorkError, CallError, KeyError, TypeError, AttributeError) as error:
        raise WorkError(f"{shown(path)} is no model that `reslab export` wrote: {shown(str(error))[:240]}") from error
    return model, held


def _metadata(opened: Any) -> dict[str, Any]:
    text = opened.get_modelmeta().custom_metadata_map.get(METADATA)
    if text is None:
        raise WorkError("it has no reslab metadata")
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WorkError("its metadata are not JSON") from error
    if not isinstance(held, dict) or not isinstance(held.get("spec"), dict) or not isinstance(held.get("preprocess"), dict):
        raise WorkError("its metadata lack the spec or the preprocessing")
    return held


def _check_interface(model: OnnxModel) -> None:
    inputs, outputs = model.session.get_inputs(), [node.name for node in model.session.get_outputs()]
    frame = model.preprocess
    fits = len(inputs) == 1 and inputs[0].name == INPUT and inputs[0].type == "tensor(uint8)" and len(inputs[0].shape) == 4
    if not fits or inputs[0].shape[3] != frame.channels or OUTPUTS[1] not in outputs:
        found = [(node.name, node.type, node.shape) for node in inputs]
        raise WorkError(f"it must take uint8 {INPUT} (batch, height, width, {frame.channels}) and give {OUTPUTS[1]}; it takes {found} and gives {outputs}")
    model.logits(np.zeros((1, frame.canvas, frame.canvas, frame.channels), np.uint8))
