"""int8 and bf16: what the graphs hold, and that the verdict decides by what was measured."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import reslab
from reslab.run import Run
from reslab.use import quantize, race
from reslab.use.classifier import Classifier
from reslab.use.export import export, find_images, in_words
from reslab.use.formats import openvino_core, to_onnx
from reslab.use.onnx import session


@pytest.fixture(scope="module")
def classifier(trained: Run) -> Classifier:
    return reslab.load(trained.path)


@pytest.fixture(scope="module")
def graph(classifier: Classifier) -> bytes:
    return to_onnx(classifier)


@pytest.fixture(scope="module")
def calibration(trained: Run, classifier: Classifier) -> tuple[Any, Any]:
    images, _ = find_images(trained.path, classifier, lambda *_: None)
    assert images is not None
    first, others = quantize._training_pixels(classifier, images)
    assert len(first) == len(others) == len(images.split["train"]) // 2
    assert not {pixels.tobytes() for pixels in first} & {pixels.tobytes() for pixels in others}, "chosen on other images"
    return first, others


def _timed(int8: float) -> Any:
    return lambda runs, seconds=0.0: {"fp32": 0.010, "converted": int8}


@pytest.mark.parametrize("method", quantize.METHODS)
@pytest.mark.parametrize("float_ends", [False, True])
def test_int8_has_unsigned_activations_and_signed_weights_a_scale_a_channel(
    classifier: Classifier, graph: bytes, calibration: tuple[Any, Any], method: str, float_ends: bool
) -> None:
    made = quantize.quantise(classifier, graph, calibration[0], method, float_ends)
    model = onnx.load_from_string(made)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Conv"] == 6
    weights = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in held and len(held[node.input[0]].dims) == 4]
    assert len(weights) == 6 - float_ends
    for node in weights:
        values, scale = held[node.input[0]], held[node.input[1]]
        assert values.data_type == onnx.TensorProto.INT8
        assert list(scale.dims) == [values.dims[0]], "one scale a channel"
    activations = [held[node.input[2]].data_type for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert activations
    assert set(activations) == {onnx.TensorProto.UINT8}
    heads = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [3, 16]]
    assert [tensor.data_type for tensor in heads] == [onnx.TensorProto.FLOAT if float_ends else onnx.TensorProto.INT8]
    assert json.loads(model.metadata_props[0].value)["precision"] == "int8"
    want, got = quantize._logits(session(graph), calibration[1]), quantize._logits(session(made), calibration[1])
    assert (want.argmax(1) == got.argmax(1)).mean() > 0.9


def test_the_method_nearest_to_fp32_is_kept(classifier: Classifier, graph: bytes, calibration: tuple[Any, Any]) -> None:
    made, how = quantize.best_int8(classifier, graph, *calibration)
    assert set(how["divergence"]) == set(quantize.METHODS)
    assert how["divergence"][how["method"]] == min(how["divergence"].values())
    want = quantize._logits(session(graph), calibration[1])
    assert quantize.kullback_leibler(want, quantize._logits(session(made), calibration[1]), classifier.temperature) == how["divergence"][how["method"]]


def test_kullback_leibler_against_a_case_whose_answer_is_known() -> None:
    p, q = np.array([[0.5, 0.5]]), np.array([[0.75, 0.25]])
    want = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert quantize.kullback_leibler(np.log(p).astype(np.float32), np.log(q).astype(np.float32), 1.0) == pytest.approx(want, rel=1e-6)
    assert quantize.kullback_leibler(np.log(p).astype(np.float32), np.log(p).astype(np.float32), 2.0) == 0
    p, q = np.array([[0.5, 0.5]]), np.sqrt([[0.75, 0.25]])
    hot = quantize.kullback_leibler(np.log(p).astype(np.float32), np.log(q).astype(np.float32) * 4, 2.0)
    assert hot == pytest.approx(want, rel=1e-6), "logits are divided by the temperature"


@pytest.mark.parametrize(
    ("drop", "seconds", "want"),
    [
        (0.5, {1: 1.0, 16: 1.0}, []),
        (-3.0, {1: 0.5, 16: 0.9}, []),
        (0.6, {1: 0.5, 16: 0.9}, ["0.60 points worse than fp32 (--max-drop 0.5)"]),
        (0.0, {1: 1.1, 16: 0.5}, ["slower at batch 1"]),
        (2.0, {1: 0.5, 16: 1.1}, ["slower at batch 16", "2.00 points worse than fp32 (--max-drop 0.5)"]),
    ],
)
def test_a_file_must_be_faster_at_every_batch_size_and_as_right(drop: float, seconds: dict[int, float], want: list[str]) -> None:
    found = {"drop": drop, "seconds": {size: {"fp32": 1.0, "converted": each} for size, each in seconds.items()}}
    assert quantize.objections(found, 0.5) == want


def test_calibration_takes_fewer_large_images(trained: Run, classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = find_images(trained.path, classifier, lambda *_: None)
    assert images is not None
    monkeypatch.setattr(quantize, "CALIBRATION", (2, 5))
    for room, n in ((1, 2), (4, 4), (9, 5)):
        monkeypatch.setattr(quantize, "CALIBRATION_PIXELS", room * classifier.preprocess.canvas**2)
        assert [len(pixels) for pixels in quantize._training_pixels(classifier, images)] == [n, n]


def test_ends_in_float_are_kept_where_they_save_the_accuracy(trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drops, judge = [1.0, 0.25], quantize.judge
    monkeypatch.setattr(quantize, "race", _timed(0.006))
    monkeypatch.setattr(quantize, "METHODS", ("MinMax",))
    monkeypatch.setattr(quantize, "judge", lambda *given: judge(*given) | {"drop": drops.pop(0)})
    found = export(trained.path, "onnx", tmp_path / "m.onnx", precision="int8")
    assert found.facts["conversion"]["float_ends"] is True
    assert found.facts["verdict"]["drop"] == 0.25
    weights = [tensor for tensor in onnx.load(found.path).graph.initializer if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT8}


def test_what_is_faster_and_as_right_is_kept_with_its_numbers(trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quantize, "race", _timed(0.006))
    monkeypatch.setattr(quantize, "METHODS", ("Entropy", "MinMax"))
    found = export(trained.path, "onnx", tmp_path / "m.onnx", precision="int8", max_drop=100)
    verdict = found.facts["verdict"]
    assert verdict["seconds"] == {1: {"fp32": 0.010, "converted": 0.006}, 16: {"fp32": 0.010, "converted": 0.006}}
    assert verdict["bytes"]["converted"] == found.facts["bytes"] == found.path.stat().st_size
    assert {"top1", "top1_low", "top1_high"} == set(verdict["top1"]["fp32"]) == set(verdict["top1"]["converted"])
    assert "batch 1 10.00 -> 6.00 ms (0.60x)" in "\n".join(in_words(found))
    assert json.loads((tmp_path / "m.onnx.json").read_text())["conversion"]["method"] in quantize.METHODS
    assert reslab.load(found.path).classes == reslab.load(trained.path).classes


def test_openvino_computes_in_int8_too(trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(quantize, "race", _timed(0.006))
    monkeypatch.setattr(quantize, "METHODS", ("MinMax",))
    found = export(trained.path, "openvino", tmp_path / "m.xml", precision="int8", max_drop=100)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.bin", "m.xml", "m.xml.json"]
    assert found.facts["verdict"]["bytes"]["converted"] == found.facts["bytes"] == sum((tmp_path / name).stat().st_size for name in ("m.bin", "m.xml"))
    weights = (tmp_path / "m.bin").stat().st_size
    assert weights < 0.5 * export(trained.path, "openvino", tmp_path / "fp32.xml").facts["bytes"]
    model = openvino_core().read_model(tmp_path / "m.xml")
    assert json.loads(model.get_rt_info("reslab").astype(str))["precision"] == "int8"
    precisions = Counter(
        (op.get_rt_info()["layerType"].astype(str), op.get_rt_info()["runtimePrecision"].astype(str))
        for op in openvino_core().compile_model(model, "CPU").get_runtime_model().get_ops()
    )
    computed = {precision for (layer, precision) in precisions if layer == "Convolution"}
    assert computed, precisions
    assert computed <= {"u8", "i8"}, precisions


def test_what_is_slower_is_refused_with_the_numbers(trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quantize, "race", _timed(0.0101))
    monkeypatch.setattr(quantize, "METHODS", ("MinMax",))
    with pytest.raises(reslab.WorkError, match=r"refused, because it is slower at batch 1 and 16: size .* 10\.10 ms \(1\.01x\).*val top-1") as caught:
        export(trained.path, "onnx", tmp_path / "m.onnx", precision="int8", max_drop=100)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_loses_too_much_is_tried_with_its_ends_in_float_and_then_refused(trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ends: list[bool] = []
    quantise = quantize.quantise

    def broken(classifier: Classifier, graph: bytes, pixels: Any, method: str, float_ends: bool = False) -> bytes:
        ends.append(float_ends)
        model = onnx.load_from_string(quantise(classifier, graph, pixels, method, float_ends))
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
                tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
        data: bytes = model.SerializeToString()
        return data

    monkeypatch.setattr(quantize, "race", _timed(0.006))
    monkeypatch.setattr(quantize, "quantise", broken)
    monkeypatch.setattr(quantize, "METHODS", ("MinMax", "Percentile"))
    with pytest.raises(reslab.WorkError, match=r"int8 is refused, because it is \d+\.\d\d points worse than fp32 \(--max-drop 0\.5\)"):
        export(trained.path, "onnx", tmp_path / "m.onnx", precision="int8")
    assert ends == [False, False, True]
    assert list(tmp_path.iterdir()) == []


def test_bf16_is_a_valid_graph_and_is_refused_where_onnxruntime_cannot_run_it(trained: Run, graph: bytes, classifier: Classifier, tmp_path: Path) -> None:
    made = quantize.to_bf16(classifier, graph)
    model = onnx.load_from_string(made)
    onnx.checker.check_model(model, full_check=True)
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.BFLOAT16}
    assert len(made) < 0.7 * len(graph)
    try:
        session(made)
    except reslab.WorkError:
        with pytest.raises(reslab.WorkError, match=r"bf16 is refused: onnxruntime .* cannot run this: .*NOT_IMPLEMENTED"):
            export(trained.path, "onnx", tmp_path / "m.onnx", precision="bf16")
        assert list(tmp_path.iterdir()) == []


def test_a_race_takes_turns_and_tells_the_faster_one() -> None:
    order: list[str] = []
    found = race.race({"slow": lambda: (order.append("slow"), time.sleep(0.002)), "fast": lambda: order.append("fast")}, seconds=0.0)
    assert order[:8] == ["slow", "slow", "fast", "fast"] * 2
    assert len(order) == 4 * race.ROUNDS
    assert found["slow"] > 0.002 > found["fast"]
