"""The files a classifier can be exported to: how each is written, and how it is run again to check it.

ONNX and torch.export keep the image size open and resize in the graph. Keras and OpenVINO take images of the canvas size
only: Keras has no resize that decodes as we do, and OpenVINO reads ONNX's antialiased Resize as a plain one (2026.4), which answers otherwise without a word.
"""

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from reslab.data.decode import Pixels
from reslab.data.preprocess import Preprocess
from reslab.errors import needs_extra
from reslab.use.classifier import Classifier, Logits
from reslab.use.onnx import INPUT, METADATA, OUTPUTS, session
from reslab.use.pipeline import Pipeline, trace

OPSET = 20  # an antialiased Resize needs 18

Answer = tuple[Logits, Logits]  # probabilities and logits
Runner = Callable[[Pixels], Answer]


Store = Callable[[bytes, str, Path], None]


class Format(NamedTuple):
    """One kind of file. `write` makes it (and files of the same stem beside it) at a path, `open` runs it.

    With `precisions` beside fp32, `store` writes an ONNX graph, which may be in one of these, with its metadata; `any_size` is for that graph.
    """

    suffix: str
    write: Callable[[Classifier, Path], None]
    open: Callable[[Path], Runner]
    precisions: tuple[str, ...] = ()
    store: Store | None = None
    any_size: bool = True


def metadata(classifier: Classifier, precision: str = "fp32") -> str:
    """What an exported file says of itself, as JSON. A mean image is in the graph only: as text it would outweigh the net."""
    preprocess = classifier.preprocess
    assert isinstance(preprocess, Preprocess)
    held = {name: value for name, value in preprocess.to_dict().items() if name != "mean" or preprocess.mean.ndim == 1}
    facts = {"classes": classifier.classes, "temperature": classifier.temperature, "sure": classifier.sure, "precision": precision}
    return json.dumps({**facts, "preprocess": held, "spec": asdict(classifier.spec)})


def to_onnx(classifier: Classifier, any_size: bool = True) -> bytes:
    """A whole .onnx file: `images` uint8 (batch, height, width, C) -> `probabilities` and `logits`. Batch norm is folded."""
    try:
        import onnx
        import onnxscript  # noqa: F401  # what torch.onnx is built on
    except ImportError as error:
        raise needs_extra(error.name or "onnx", "export") from error
    with quietly():
        program = torch.onnx.export(
            trace(Pipeline(classifier, any_size)),
            dynamo=True, input_names=[INPUT], output_names=OUTPUTS, opset_version=OPSET, verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        for dimension, name in zip(value.type.tensor_type.shape.dim, ("batch", "height", "width"), strict=False):
            if dimension.dim_param:  # a fixed size has a value instead
                dimension.dim_param = name
    finish(model, metadata(classifier))
    if any_size:
        resize_where_needed(model.graph, classifier.preprocess.canvas)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def resize_where_needed(graph: Any, canvas: int) -> None:
    """Puts the Resize of a graph behind a condition: images of the canvas size, the usual ones, need not wait for it (5 % of an int8 ResNet-50 at 224 px)."""
    from onnx import TensorProto, helper

    (resize,) = [node for node in graph.node if node.op_type == "Resize"]
    square, resized = resize.input[0], resize.output[0]

    def branch(node: Any) -> Any:
        return helper.make_graph(
            [node], node.output[0], [], [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["batch", None, canvas, canvas])]
        )

    as_it_is = helper.make_node("Reshape", [square, "canvas_shape"], ["as_it_is"])  # to the same shape, and so that it is known
    other = type(resize)()
    other.CopyFrom(resize)
    other.output[0] = "other_size"
    nodes = [
        helper.make_node("Shape", [square], ["side"], start=3),
        helper.make_node("Equal", ["side", "canvas"], ["fits"]),
        helper.make_node("If", ["fits"], [resized], then_branch=branch(as_it_is), else_branch=branch(other)),
    ]
    for name, values in {"canvas": [canvas], "canvas_shape": [0, 0, canvas, canvas]}.items():
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    place = list(graph.node).index(resize)
    graph.node.remove(resize)
    for node in reversed(nodes):
        graph.node.insert(place, node)


def finish(model: Any, text: str) -> None:
    """Replaces all that tools wrote about the graph, which is large and holds paths of this machine, by our metadata."""
    graph = model.graph
    for part in (model, graph):
        del part.metadata_props[:]
    for node in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.value_info[:]
    model.metadata_props.add(key=METADATA, value=text)
    model.producer_name = "reslab"


def write_onnx(classifier: Classifier, path: Path) -> None:
    """A .onnx file, its metadata under the key `reslab`: what `reslab.load` reads without torch."""
    store_onnx(to_onnx(classifier), metadata(classifier), path)


def store_onnx(graph: bytes, text: str, path: Path) -> None:
    """The graph as it is: it holds its metadata."""
    path.write_bytes(graph)


def run_onnx(path: Path) -> Runner:
    """The file in onnxruntime."""
    opened = session(path.read_bytes())
    return lambda pixels: tuple(opened.run(list(OUTPUTS), {INPUT: pixels}))


def write_torch(classifier: Classifier, path: Path) -> None:
    """A .pt2 file for torch.export.load, its metadata as the extra file reslab.json."""
    program = trace(Pipeline(classifier))
    program._example_inputs = None  # would be stored as a pickle
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    with quietly():
        torch.export.save(program, path, extra_files={f"{METADATA}.json": metadata(classifier)})


def run_torch(path: Path) -> Runner:
    """The file in torch."""
    with quietly():
        module = torch.export.load(path).module()

    @torch.no_grad()
    def run(pixels: Pixels) -> Answer:
        probabilities, logits = module(torch.from_numpy(pixels.copy()))
        return probabilities.numpy(), logits.numpy()

    return run


def openvino() -> Any:
    """OpenVINO without its telemetry, which reports the import itself. Raises WorkError when it is not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO puts a stub in its place
    try:
        import openvino
    except ImportError as error:
        raise needs_extra("openvino", "openvino") from error
    return openvino


@cache
def openvino_core() -> Any:
    """The process's one OpenVINO core.

    Each core moves the signal stack of the thread that compiles first, and of two, the one that goes last leaves the thread a stack that
    the other has unmapped: the process ends at its next signal (OpenVINO 2026.4). One that stays takes nothing away.
    """
    return openvino().Core()


def write_openvino(classifier: Classifier, path: Path) -> None:
    """A .xml file and the .bin of its weights, both in fp32; the metadata are the runtime information `reslab`."""
    openvino()  # where it is missing, nothing else is done first
    store_openvino(to_onnx(classifier, any_size=False), metadata(classifier), path)


def store_openvino(graph: bytes, text: str, path: Path) -> None:
    """An ONNX graph, with weights as precise as it has them, as a .xml and a .bin file."""
    model = openvino_core().read_model(graph, b"")
    model.set_rt_info(text, [METADATA])
    openvino().save_model(model, str(path), compress_to_fp16=False)


def run_openvino(path: Path) -> Runner:
    """The files in OpenVINO on the CPU; what is not in int8 is computed in fp32 also where the hardware prefers bf16."""
    compiled = openvino_core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(pixels: Pixels) -> Answer:
        found = compiled(pixels)
        return np.array(found[OUTPUTS[0]]), np.array(found[OUTPUTS[1]])

    return run


def write_keras(classifier: Classifier, path: Path) -> None:
    """A .keras file of images of the canvas size; beside it, as NAME.reslab.json, the metadata. Needs reslab to be read again."""
    from reslab.keras_backend import keras
    from reslab.nets.keras import from_torch

    preprocess = classifier.preprocess
    assert isinstance(preprocess, Preprocess)
    size, canvas, layers = preprocess.image_size, preprocess.canvas, keras.layers
    mean = np.moveaxis(preprocess.mean, 0, -1)  # Keras has channels last
    images = keras.Input((canvas, canvas, preprocess.channels), dtype="uint8", name=INPUT)
    x = layers.Rescaling(1 / 255)(images)
    if canvas > size:
        before = (canvas - size) // 2
        x = layers.Cropping2D(((before, canvas - size - before),) * 2)(x)
    x = layers.Normalization((1, 2, 3) if mean.ndim == 3 else -1, mean, np.broadcast_to(preprocess.std**2, mean.shape))(x)
    net = from_torch(classifier.net, size)
    logits = _keras_views(net, x, preprocess.tta)
    probabilities = layers.Softmax(name=OUTPUTS[0])(layers.Rescaling(1 / classifier.temperature)(logits))
    with quietly():
        keras.Model(images, {OUTPUTS[0]: probabilities, OUTPUTS[1]: logits}).save(path)
    path.with_suffix(f".{METADATA}.json").write_text(metadata(classifier), "utf-8")


def _keras_views(net: Any, x: Any, tta: str) -> Any:
    """Logits as `Preprocess.views` and `answer` make them."""
    from reslab.keras_backend import keras

    def both(image: Any) -> Any:
        return keras.layers.Average()([net(image), net(keras.ops.flip(image, axis=2))])

    if tta == "none":
        return net(x)
    if tta == "mirror":
        return both(x)
    wide = keras.ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = keras.layers.Average()([both(wide[:, :-2, :-2]), both(wide[:, 2:, 2:])])
    return keras.layers.Average()([both(x), shifted])


def run_keras(path: Path) -> Runner:
    """The file in Keras, on the backend that it is set to."""
    from reslab.nets.keras import load

    with quietly():
        model = load(path)

    def run(pixels: Pixels) -> Answer:
        found = model.predict_on_batch(pixels)
        return np.asarray(found[OUTPUTS[0]]), np.asarray(found[OUTPUTS[1]])

    return run


FORMATS = {
    "onnx": Format(".onnx", write_onnx, run_onnx, ("int8", "bf16"), store_onnx),
    "torch": Format(".pt2", write_torch, run_torch),
    "keras": Format(".keras", write_keras, run_keras),
    "openvino": Format(".xml", write_openvino, run_openvino, ("int8",), store_openvino, any_size=False),
}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps progress and warnings of exporters and quantisers off the terminal; their errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
