"""A net in int8 or bf16, as ONNX or OpenVINO, and the verdict on it: measured on this machine, on the user's own images.

int8 is static: quantise and dequantise nodes, activations unsigned in 8 bits, weights signed with a scale a channel. The
ranges of activations come from training images, by three methods; the one whose probabilities are nearest to fp32 on
other training images is kept. val is looked at for the verdict only.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reslab.data.decode import Pixels
from reslab.data.images import Images, read_batches
from reslab.errors import WorkError
from reslab.interval import share
from reslab.use.classifier import BATCH, Classifier, Logits, softmax
from reslab.use.formats import Format, Runner, finish, metadata, quietly, to_onnx
from reslab.use.onnx import INPUT, OUTPUTS, runtime, session
from reslab.use.race import race

MAX_DROP = 0.5  # points of val top-1
METHODS = ("MinMax", "Entropy", "Percentile")  # of onnxruntime, for the ranges of activations
CALIBRATION = (128, 512)  # images, fewer where they are large
CALIBRATION_PIXELS = 1 << 22
BATCH_SIZES = (1, 16)  # at which latency counts

Verdict = dict[str, Any]


def convert(
    classifier: Classifier, images: Images, made: Path, form: Format, precision: str, max_drop: float, say: Callable[[str], None]
) -> Verdict:  # fmt: skip
    """Replaces the fp32 file at `made` by one in int8 or bf16. Raises WorkError, with the numbers, when it is not worth it."""
    before = to_onnx(classifier, form.any_size)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        converted = Path(folder) / made.name  # with what belongs to it beside it

        def found(graph: bytes) -> Verdict:
            assert form.store is not None
            form.store(graph, metadata(classifier, precision), converted)
            return judge({"fp32": made, "converted": converted}, form.open, images, classifier)

        if precision == "bf16":
            try:
                how, verdict = Verdict(), found(to_bf16(classifier, before))
            except WorkError as error:
                raise WorkError(f"bf16 is refused: {error}") from error
        else:
            calibration, others = _training_pixels(classifier, images)
            graph, how = best_int8(classifier, before, calibration, others)
            say(f"calibrated on {len(calibration)} training images: {how['method']} is the nearest to fp32")
            verdict = found(graph)
            if verdict["drop"] > max_drop:
                graph = quantise(classifier, before, calibration, how["method"], float_ends=True)
                how, verdict = how | {"float_ends": True}, found(graph)
        reasons = objections(verdict, max_drop)
        if reasons:
            raise WorkError(f"{precision} is refused, because it is {' and '.join(reasons)}: {in_words(verdict)}")
        for file in converted.parent.iterdir():
            file.replace(made.with_name(file.name))
    return {"conversion": how, "verdict": verdict}


def best_int8(classifier: Classifier, graph: bytes, calibration: Pixels, others: Pixels) -> tuple[bytes, dict[str, Any]]:
    """The graph in int8 by the best of METHODS, and the divergence from fp32 of each, in nats."""
    want = _logits(session(graph), others)
    made = {method: quantise(classifier, graph, calibration, method) for method in METHODS}
    divergence = {method: kullback_leibler(want, _logits(session(found), others), classifier.temperature) for method, found in made.items()}
    best = min(divergence, key=lambda method: divergence[method])
    return made[best], {"method": best, "divergence": divergence, "calibration_images": len(calibration), "float_ends": False}


def quantise(classifier: Classifier, graph: bytes, pixels: Pixels, method: str, float_ends: bool = False) -> bytes:
    """The graph in int8, with ranges from `pixels`. With `float_ends` the first convolution and the head stay in fp32."""
    runtime()
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    nodes = net_nodes(onnx.load_from_string(graph))
    chosen = nodes[1:-1] if float_ends else nodes
    with tempfile.TemporaryDirectory() as folder, quietly():
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(graph)
        quantize_static(
            source, target, _Reader(pixels), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod[method],
            nodes_to_quantize=[node.name for node in chosen], extra_options={"CalibStridedMinMax": 1},
        )  # fmt: skip
        model = onnx.load(target)
    _shorten_names(model.graph)
    finish(model, metadata(classifier, "int8"))
    data: bytes = model.SerializeToString()
    return data


def to_bf16(classifier: Classifier, graph: bytes) -> bytes:
    """The graph with the net's weights and arithmetic in bf16; preprocessing and softmax stay in fp32."""
    import onnx

    bf16, fp32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    model = onnx.load_from_string(graph)
    nodes = net_nodes(model)
    used = {name for node in nodes for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name in used and tensor.data_type == fp32:
            values = onnx.numpy_helper.to_array(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(bf16))
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    enter = onnx.helper.make_node("Cast", [nodes[0].input[0]], ["net_in"], to=bf16)
    leave = onnx.helper.make_node("Cast", ["net_out"], [nodes[-1].output[0]], to=fp32)
    nodes[0].input[0], nodes[-1].output[0] = "net_in", "net_out"
    places = list(model.graph.node)
    model.graph.node.insert(places.index(nodes[-1]) + 1, leave)
    model.graph.node.insert(places.index(nodes[0]), enter)
    model.opset_import[0].version = 22  # the first with convolutions in bf16
    finish(model, metadata(classifier, "bf16"))
    data: bytes = model.SerializeToString()
    return data


def net_nodes(model: Any) -> list[Any]:
    """The nodes of the net in an exported graph: from the first convolution to the head. Before is preprocessing, after softmax."""
    nodes = list(model.graph.node)
    first = next(i for i, node in enumerate(nodes) if node.op_type == "Conv")
    return nodes[first : max(i for i, node in enumerate(nodes) if node.op_type == "Gemm") + 1]


def _shorten_names(graph: Any) -> None:
    """Numbers the tensors: the names that the quantiser gives them are a fourteenth of a ResNet-20."""
    names = {value.name: value.name for value in (*graph.input, *graph.output)} | {"": ""}  # "" is an input left out
    for tensor in graph.initializer:
        tensor.name = names.setdefault(tensor.name, f"t{len(names)}")
    _rename(graph, names)


def _rename(graph: Any, names: dict[str, str]) -> None:
    """In the branches of a condition too, which see the tensors around them."""
    for node in graph.node:
        node.name = ""
        for ends in (node.input, node.output):
            ends[:] = [names.setdefault(name, f"t{len(names)}") for name in ends]
        for branch in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
            _rename(branch, names)
            branch.output[0].name = names[branch.output[0].name]


class _Reader:
    """Calibration images for onnxruntime, a batch at a time: it keeps every activation of what it is given at once."""

    def __init__(self, pixels: Pixels, batch_size: int = 8) -> None:
        self.batches = [{INPUT: pixels[i : i + batch_size]} for i in range(0, len(pixels), batch_size)]
        self.set_range(0, len(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.batches[start_index:end_index])

    def get_next(self) -> dict[str, Pixels] | None:
        return next(self.left, None)


def kullback_leibler(logits: Logits, others: Logits, temperature: float) -> float:
    """The mean divergence of the second distribution of each row from the first, in nats."""
    p, q = (softmax(z.astype(np.float64) / temperature) for z in (logits, others))
    return float((p * (np.log(p + 1e-30) - np.log(q + 1e-30))).sum(1).mean())


def judge(files: dict[str, Path], opened: Callable[[Path], Runner], images: Images, classifier: Classifier) -> Verdict:
    """Size, latency and val top-1 of two files by name, `fp32` and `converted`, each alone in its folder but for what belongs to it."""
    canvas, runs = classifier.preprocess.canvas, {name: opened(file) for name, file in files.items()}
    n, right = 0, dict.fromkeys(runs, 0)
    for pixels, labels, _ in read_batches(images, images.split["val"], canvas, BATCH):
        n += len(labels)
        for name, run in runs.items():
            right[name] += int((run(pixels)[1].argmax(1) == labels).sum())
    found: Verdict = {"n": n, "drop": 100 * (right["fp32"] - right["converted"]) / n, "bytes": {name: _bytes(file) for name, file in files.items()}}
    found["top1"] = {name: share("top1", count, n) for name, count in right.items()}
    first = next(read_batches(images, images.split["val"], canvas, max(BATCH_SIZES)))[0]
    found["seconds"] = {}
    for size in BATCH_SIZES:
        batch = np.resize(first, (size, *first.shape[1:]))
        found["seconds"][size] = race({name: partial(run, batch) for name, run in runs.items()})
    return found


def _bytes(file: Path) -> int:
    """Of a file and what belongs to it."""
    return sum(each.stat().st_size for each in file.parent.iterdir() if each.is_file())


def objections(found: Verdict, max_drop: float) -> list[str]:
    """Why a converted graph is not worth having; empty when it is."""
    slower = [size for size, times in found["seconds"].items() if times["converted"] > times["fp32"]]
    reasons = [f"slower at batch {' and '.join(map(str, slower))}"] if slower else []
    return reasons + [f"{found['drop']:.2f} points worse than fp32 (--max-drop {max_drop:g})"] * (found["drop"] > max_drop)


def in_words(found: Verdict) -> str:
    """A verdict on one line, fp32 first."""

    def top1(name: str) -> str:
        facts = found["top1"][name]
        return f"{facts['top1']:.2%} [{facts['top1_low']:.2%}, {facts['top1_high']:.2%}]"

    latency = [
        f"batch {size} {1e3 * t['fp32']:.2f} -> {1e3 * t['converted']:.2f} ms ({t['converted'] / t['fp32']:.2f}x)" for size, t in found["seconds"].items()
    ]
    size = found["bytes"]
    parts = [
        f"size {size['fp32']:,} -> {size['converted']:,} bytes ({size['converted'] / size['fp32']:.3f}x)",
        *latency,
        f"val top-1 {top1('fp32')} -> {top1('converted')}, n = {found['n']:,}",
    ]
    return "; ".join(parts)


def _logits(opened: Any, pixels: Pixels) -> Logits:
    rows = [opened.run([OUTPUTS[1]], {INPUT: pixels[i : i + BATCH]})[0] for i in range(0, len(pixels), BATCH)]
    return np.concatenate(rows)


def _training_pixels(classifier: Classifier, images: Images) -> tuple[Pixels, Pixels]:
    """Training images to calibrate on, and as many others to choose by."""
    canvas, train = classifier.preprocess.canvas, images.split["train"]
    most = max(CALIBRATION[0], min(CALIBRATION[1], CALIBRATION_PIXELS // canvas**2))
    n = min(most, len(train) // 2)
    items = np.random.default_rng(0).permutation(train)[: 2 * n]
    pixels = next(read_batches(images, items, canvas, len(items)), None)
    if pixels is None or len(pixels[0]) < 2:
        raise WorkError("int8 is calibrated on training images; fewer than two can be read: `reslab check` lists them")
    half = len(pixels[0]) // 2
    return pixels[0][:half], pixels[0][half:]
