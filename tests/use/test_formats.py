"""Each format answers as the net does, for every kind of block; and what is in the files, and what is not."""

import json
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from reslab.data.decode import resize
from reslab.errors import WorkError
from reslab.spec import Spec
from reslab.use.artefact import TorchModel
from reslab.use.export import _sample, check, compare
from reslab.use.features import features
from reslab.use.formats import FORMATS, openvino, to_onnx
from reslab.use.onnx import INPUT, OUTPUTS, session
from tests.use.conftest import TINY, classifier_of

# Every kind of block that a Spec can say: a new one is one row here.
KINDS = {
    "basic, shortcut A": Spec("basic", (1, 2), (8, 16), "conv3", "A"),
    "basic, shortcut B": Spec("basic", (1, 1), (8, 16), "conv7-pool", "B"),
    "basic, shortcut C": Spec("basic", (1, 1), (8, 16), "conv7", "C"),
    "plain": Spec("basic", (2, 1), (8, 16), "conv3", "none"),
    "without norm": Spec("basic", (1, 1), (8, 16), "conv3", norm="none"),
    "bottleneck v1": Spec("bottleneck", (1, 1), (8, 16), "conv3", stride="v1"),
    "bottleneck v1.5": Spec("bottleneck", (1, 1), (8, 16), "conv7-pool"),
    "grouped": Spec("bottleneck", (1, 1), (8, 16), "conv3", groups=4, inner=2),
    "pre-activation": Spec("basic", (1, 2), (8, 16), "conv3", order="preact", dropout=0.3),
    "pre-activation, bottleneck, Keras V2": Spec("bottleneck", (2, 1), (8, 16), "raw7-zeropool", order="preact", stride="last", bias="unnormed"),
    "ReLU-only pre-activation": Spec("basic", (1, 1), (8, 16), "conv3", order="relu-preact"),
    "BN after addition": Spec("basic", (1, 1), (8, 16), "conv3", order="bn-after-add"),
    "squeeze-and-excitation": Spec("bottleneck", (1, 1), (8, 16), "conv3", squeeze=4),
    "D": Spec("basic", (1, 2), (8, 16), "deep-pool", "D", drop_path=0.2),
    "RS": Spec("bottleneck", (1, 1), (8, 16), "deep-conv", "D", squeeze=4),
    "pooled": Spec("basic", (1, 2), (8, 16), "conv3", "A", "pool"),
    "late": Spec("basic", (1, 2), (8, 16), "conv3", "late"),
    "blurred": Spec("basic", (1, 2), (8, 16), "conv7-pool", antialias=True),
    "group norm": Spec("basic", (1, 1), (8, 16), "conv3", norm="group"),
    "exclusive gate": Spec("basic", (1, 1), (8, 16), "conv3", carry="exclusive-gate"),
    "Fixup": Spec("basic", (1, 1), (8, 16), "conv3", "A", norm="none", init="fixup"),
    "ReZero": Spec("basic", (1, 1), (8, 16), "conv3", norm="none", init="rezero", order="relu-before-add"),
    "SkipBlock": Spec("skip", (1, 2), (8, 16), "conv3-pool", bias="all", flatten=32),
}
UNFOLDED = ("preact", "relu-preact", "bn-after-add")  # a norm that no convolution comes before stays


def answer(graph: bytes):  # type: ignore[no-untyped-def]
    opened = session(graph)
    return lambda pixels: tuple(opened.run(list(OUTPUTS), {INPUT: pixels}))


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_answers_as_the_net_with_random_weights_and_statistics(kind: str) -> None:
    classifier = classifier_of(KINDS[kind])
    graph = to_onnx(classifier)
    found = check(classifier, answer(graph), _sample(classifier, None, "random weights"))
    assert (found["n"], found["agreement"]) == (256, 1.0)
    assert found["max_difference"] <= 1e-4
    assert found["max_logit_difference"] <= 1e-4
    operators = Counter(node.op_type for node in onnx.load_from_string(graph).graph.node)
    unfolded = KINDS[kind].order in UNFOLDED or KINDS[kind].stride == "pool"
    assert operators["BatchNormalization"] == 0 or unfolded, "batch norm must be folded into the convolutions"
    assert operators["Gather"] == 0, "pooling must not become a stride trick"


def test_one_corrupted_weight_is_noticed() -> None:
    classifier = classifier_of(TINY)
    model = onnx.load_from_string(to_onnx(classifier))
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("fc.bias"))
    values = onnx.numpy_helper.to_array(bias).copy()
    values[2] += 0.01
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    sample = _sample(classifier, None, "")
    with pytest.raises(WorkError, match=r"must answer within 0\.0001 of its net; on 256 random images"):
        check(classifier, answer(model.SerializeToString()), sample)
    nan = compare(classifier, lambda pixels: (np.full((len(pixels), 5), np.nan), classifier.logits(pixels)), sample)
    assert nan["max_difference"] == float("inf")


@pytest.mark.parametrize(("to", "channels"), [("onnx", 1), ("onnx", 3), ("torch", 1), ("keras", 1), ("keras", 3), ("openvino", 1)])
def test_every_format_holds_mean_image_and_crop_also_with_one_channel(to: str, channels: int, tmp_path: Path) -> None:
    if to == "openvino":
        pytest.importorskip("openvino")
    classifier = classifier_of(TINY, size=16, canvas=20, in_channels=channels)
    model = classifier.model
    assert isinstance(model, TorchModel)
    mean = np.random.default_rng(0).random((channels, 16, 16), dtype=np.float32)
    classifier = replace(classifier, model=TorchModel(model.net, replace(model.preprocess, mean=mean)))
    file = tmp_path / f"model{FORMATS[to].suffix}"
    FORMATS[to].write(classifier, file)
    run = FORMATS[to].open(file)
    assert check(classifier, run, _sample(classifier, None, ""))["agreement"] == 1.0
    one = np.random.default_rng(1).integers(0, 256, (1, 20, 20, channels), dtype=np.uint8)
    assert np.allclose(run(one)[1], classifier.logits(one), atol=1e-5), "a batch of one"


@pytest.mark.parametrize("tta", ["mirror", "shifts"])
@pytest.mark.parametrize("to", FORMATS)
def test_every_format_looks_at_the_views_that_the_classifier_looks_at(to: str, tta: str, tmp_path: Path) -> None:
    if to == "openvino":
        pytest.importorskip("openvino")
    plain = classifier_of(TINY)
    assert isinstance(plain.model, TorchModel)
    classifier = replace(plain, model=TorchModel(plain.model.net, replace(plain.model.preprocess, tta=tta)))
    sample = _sample(classifier, None, "")
    pixels, _ = next(iter(sample.batches()))
    wide = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    as_it_is, mirrored, up, down = (
        (plain.logits(image) + plain.logits(image[:, :, ::-1])) / 2 for image in (pixels, pixels[:, :, ::-1], wide[:, :-2, :-2], wide[:, 2:, 2:])
    )
    assert np.allclose(as_it_is, mirrored, atol=1e-5)
    assert not np.allclose(plain.logits(pixels), as_it_is, atol=1e-2)
    assert not np.allclose(up, as_it_is, atol=1e-3)
    assert np.allclose(classifier.logits(pixels), as_it_is if tta == "mirror" else as_it_is / 2 + up / 4 + down / 4, atol=1e-5)
    file = tmp_path / f"model{FORMATS[to].suffix}"
    FORMATS[to].write(classifier, file)
    assert check(classifier, FORMATS[to].open(file), sample)["agreement"] == 1.0


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_the_graph_takes_images_of_any_size_and_resizes_as_decoding_does(to: str, tmp_path: Path) -> None:
    classifier = classifier_of(TINY)
    FORMATS[to].write(classifier, tmp_path / "model")
    run = FORMATS[to].open(tmp_path / "model")
    for height, width in ((90, 130), (64, 64), (20, 33), (32, 32)):
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        want = classifier.logits(resize(image, 32)[None])
        stride = min(height, width) / 32
        nearest = (np.arange(32) * stride).astype(int)
        naive = classifier.logits(image[nearest][:, nearest][None])
        got = run(image[None])[1]
        if (height, width) == (32, 32):
            assert np.allclose(got, want, atol=1e-5)
        else:
            assert np.abs(got - want).max() < 0.25 * np.abs(naive - want).max(), (height, width)


def test_only_images_of_another_size_wait_for_the_resize() -> None:
    classifier = classifier_of(TINY)
    model = onnx.load_from_string(to_onnx(classifier))
    (choice,) = [node for node in model.graph.node if node.op_type == "If"]
    branches = {attribute.name: attribute.g for attribute in choice.attribute}
    (resized,) = branches["else_branch"].node
    assert resized.op_type == "Resize"
    next(attribute for attribute in resized.attribute if attribute.name == "coordinate_transformation_mode").s = b"asymmetric"
    run, wrong = answer(to_onnx(classifier)), answer(model.SerializeToString())
    rng = np.random.default_rng(0)
    fitting, other = (rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8) for side in (32, 48))
    assert np.array_equal(run(fitting)[1], wrong(fitting)[1])
    assert not np.allclose(run(other)[1], wrong(other)[1], atol=1e-2)


def test_openvino_loads_without_its_telemetry() -> None:
    pytest.importorskip("openvino")
    code = "import sys; from reslab.use.formats import openvino; openvino(); print(sys.modules.get('openvino_telemetry'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "None"
    assert openvino().__name__ == "openvino"


def test_a_signal_behind_two_openvino_models_is_handled(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    file = tmp_path / "model.xml"
    FORMATS["openvino"].write(classifier_of(TINY), file)
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from reslab.use.formats import run_openvino
        signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
        first, second = (run_openvino(Path(sys.argv[1])) for _ in range(2))
        del first
        del second
        os.kill(os.getpid(), signal.SIGUSR1)
    """
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_files_hold_metadata_but_no_path_of_this_machine_and_no_pickle(tmp_path: Path) -> None:
    classifier = classifier_of(TINY)
    FORMATS["onnx"].write(classifier, tmp_path / "model.onnx")
    FORMATS["torch"].write(classifier, tmp_path / "model.pt2")
    here = str(Path(__file__).parents[2]).encode()
    assert here not in (tmp_path / "model.onnx").read_bytes()
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        held = {Path(name).name: archive.read(name) for name in archive.namelist()}
    assert not any(here in data for data in held.values())
    assert not [name for name, data in held.items() if data[:2] == b"PK" or data[:1] == b"\x80"]
    opened = session((tmp_path / "model.onnx").read_bytes())
    assert json.loads(held["reslab.json"]) == json.loads(opened.get_modelmeta().custom_metadata_map["reslab"])
    facts = json.loads(held["reslab.json"])
    assert (facts["classes"], facts["sure"], facts["temperature"], facts["precision"]) == (list("abcde"), 0.6, 1.3, "fp32")
    assert [node.shape for node in opened.get_inputs()] == [["batch", "height", "width", 3]]


def test_probabilities_are_calibrated_and_exporting_leaves_the_net_as_it_was() -> None:
    classifier = classifier_of(TINY)
    before = {name: tensor.clone() for name, tensor in classifier.net.state_dict().items()}
    pixels = np.random.default_rng(3).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    probabilities, logits = answer(to_onnx(classifier))(pixels)
    scaled = np.exp(logits / 1.3)
    assert np.allclose(probabilities, scaled / scaled.sum(1, keepdims=True), atol=1e-6), "divided by the temperature"
    assert all((tensor == before[name]).all() for name, tensor in classifier.net.state_dict().items())
    assert not classifier.net.training


def test_features_of_an_image_are_the_mean_of_both_views_where_two_are_looked_at() -> None:
    plain = classifier_of(TINY)
    assert isinstance(plain.model, TorchModel)
    both = replace(plain, model=TorchModel(plain.model.net, replace(plain.model.preprocess, tta="mirror")))
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = features(both, pixels)
    assert found.shape == (3, 16)
    assert torch.allclose(found, (features(plain, pixels) + features(plain, pixels.flip(2))) / 2, atol=1e-5)
