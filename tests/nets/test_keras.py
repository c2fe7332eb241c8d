import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import reslab
from reslab import keras_backend
from reslab.family import FAMILY
from reslab.nets.keras import build, convolutional_block, from_torch, identity_block, keras, load, save
from reslab.nets.keras_weights import from_keras, to_keras
from reslab.spec import Spec
from tests.conftest import scramble
from tests.nets.parity import TOLERANCE, blocks, counts, distinct, expected_counts, pair, shallow, worst

DISTINCT = distinct()
PUBLISHED = {  # as Keras counts: all, and not trainable
    "keras_teaching_resnet50": (23_600_006, 53_120),
    "keras_resnet50": (25_636_712, 53_120),
    "keras_resnet50v2": (25_613_800, 45_440),
}
REPO = Path(__file__).parents[2]


@pytest.mark.parametrize("spec", DISTINCT, ids=[names[0] for names in DISTINCT.values()])
def test_keras_equals_torch_block_by_block_and_counts_what_arithmetic_counts(spec: Spec) -> None:
    """Every row of FAMILY is one of these, or one of these but deeper and wider; benchmarks/keras_parity.py has them in full."""
    assert counts(build(spec)) == expected_counts(spec)
    assert worst(spec) < TOLERANCE


def test_every_row_is_checked() -> None:
    assert {name for names in DISTINCT.values() for name in names} == set(FAMILY)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_one_corrupted_channel_is_noticed(train: bool) -> None:
    spec = shallow(FAMILY["resnet50"].spec)
    net, model = pair(spec)
    net.layer2[1].bn2.bias.data[0] += 0.5
    probe = blocks(spec, model)
    with torch.no_grad():
        net.train(train)
        x = torch.randn(4, 3, 64, 64)
        outputs: dict[str, torch.Tensor] = {}
        net(x, outputs)
        theirs = probe(x.permute(0, 2, 3, 1).numpy(), training=train)
    apart = [(a.permute(0, 2, 3, 1) - b).abs().max() / a.abs().max() > TOLERANCE for a, b in zip(list(outputs.values())[1:], theirs, strict=False)]
    assert apart == [False] * 3 + [True] * 5


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_rows_count_what_keras_publishes(name: str) -> None:
    model = build(name, FAMILY[name].image_size)
    assert (model.count_params(), counts(model)[1]) == PUBLISHED[name]
    assert counts(model) == expected_counts(FAMILY[name].spec)


def test_classic_network_built_by_hand_is_the_teaching_row() -> None:
    """64x64x3, 2x2 average pool, 6 classes, Keras's own epsilon: the row has no more and no less."""
    has = keras.layers
    image = keras.Input((64, 64, 3))
    x = has.Conv2D(64, 7, 2, name="conv1")(has.ZeroPadding2D(3)(image))
    x = has.MaxPooling2D(3, 2)(has.ReLU()(has.BatchNormalization(name="bn1")(x)))
    for stage, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=1):
        filters = (width, width, 4 * width)
        x = convolutional_block(x, filters, stride=1 if stage == 1 else 2, name=f"layer{stage}-0")
        for index in range(1, depth):
            x = identity_block(x, filters, name=f"layer{stage}-{index}")
    classic = keras.Model(image, has.Dense(6, name="fc")(has.Flatten()(has.AveragePooling2D(2)(x))))
    net = scramble(reslab.build("keras_teaching_resnet50")).eval()
    model = from_torch(net)
    to_keras(net, classic)
    assert (classic.count_params(), counts(classic)) == (23_600_006, counts(model))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, by_hand, torchs = model(images.permute(0, 2, 3, 1)), classic(images.permute(0, 2, 3, 1)), net(images)
    assert (ours - by_hand).abs().max() < TOLERANCE * ours.abs().max()
    assert (torchs - by_hand).abs().max() < TOLERANCE * ours.abs().max()


def test_blocks_without_a_name_are_named_by_keras() -> None:
    x = keras.Input((9, 9, 8))
    assert identity_block(convolutional_block(x, (2, 2, 8)), (2, 2, 8)).shape == (None, 5, 5, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"zero_init": True}, {"norm": "none", "zero_init": True},
        {"norm": "none", "init": "fixup"}, {"norm": "none", "init": "rezero"}, {"carry": "shortcut-gate"},
    ],
    ids=["plain", "zero", "zero without norm", "fixup", "rezero", "gate"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["resnet20", "resnet26"])
def test_parameters_start_with_torchs_mean_and_deviation(name: str, changes: dict[str, object]) -> None:
    spec = shallow(reslab.spec(name, **changes))
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    net, twin = reslab.build(spec), reslab.build(spec)
    from_keras(build(spec), twin)
    for (parameter, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        n = ours.numel()
        if ours.std(correction=0) == 0:
            assert torch.equal(ours, theirs), parameter
        else:
            spread = 6 * ours.std() / n**0.5  # six standard errors
            assert (ours.mean() - theirs.mean()).abs() < 2 * spread and (ours.std() - theirs.std()).abs() < spread, parameter
    assert not any(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True) if a.std(correction=0) > 0)


@pytest.mark.parametrize(
    "name",
    ["resnet20", "resnet18_blur", "resnet110_exclusive_gate", "resnet110_shortcut_gate", "resnet110_fixup", "resnet110_skipinit", "resnet110_stochastic"],
)
def test_saved_models_load_in_safe_mode_and_give_the_same(name: str, tmp_path: Path) -> None:
    spec = shallow(FAMILY[name].spec)
    _, model = pair(spec)
    model.save(tmp_path / "net.keras")
    again = keras.models.load_model(tmp_path / "net.keras", safe_mode=True)
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    assert torch.equal(model(x, training=False), again(x, training=False))


def test_stock_rows_load_without_this_package(tmp_path: Path) -> None:
    model = build(shallow(FAMILY["resnet50"].spec))
    assert not [layer for layer in model.layers if not type(layer).__module__.startswith("keras.")]


def test_torch_nets_are_saved_as_keras_files_whole_or_not_at_all(tmp_path: Path) -> None:
    net = scramble(reslab.build(shallow(FAMILY["resnet20"].spec))).eval()
    save(net, tmp_path / "net.keras")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (load(tmp_path / "net.keras")(x.permute(0, 2, 3, 1), training=False) - net(x)).abs().max() < TOLERANCE * net(x).abs().max()
    with pytest.raises(reslab.CallError, match=r"ends in \.keras; received net\.h5"):
        save(net, tmp_path / "net.h5")
    (tmp_path / "file").write_text("")
    with pytest.raises(reslab.WorkError, match="cannot be written"):
        save(net, tmp_path / "file" / "net.keras")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "net.keras"]


def test_nets_deeper_than_pythons_stack_build_save_and_load(tmp_path: Path) -> None:
    spec = reslab.spec("resnet20", depths=(25, 25, 25), widths=(2, 2, 2))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(500)  # what a thousand is to ResNet-1202
    try:
        model = build(spec)
        assert len(model.layers) > sys.getrecursionlimit()
        with pytest.raises(RecursionError):
            keras.Model(model.input, model.output)
        model.save(tmp_path / "deep.keras")
        assert load(tmp_path / "deep.keras").count_params() == model.count_params()
        assert sys.getrecursionlimit() == 500
    finally:
        sys.setrecursionlimit(limit)


def test_dropped_paths_are_whole_images_as_often_as_said() -> None:
    layer = build(shallow(FAMILY["resnet110_stochastic"].spec)).get_layer("layer3-1-drop_path")
    keras.utils.set_random_seed(0)
    out = layer(np.ones((1000, 2, 2, 3), np.float32), training=True).numpy()
    assert set(np.unique(out)) == {0, 2} and (out == out[:, :1, :1, :1]).all()
    assert abs(out.mean() - 1) < 0.1
    assert (layer(np.ones((4, 2, 2, 3), np.float32), training=False).numpy() == 1).all()


def test_layers_bear_the_torch_modules_names() -> None:
    modules = {name.replace(".", "-") for name, module in reslab.build("resnet50d").named_modules() if not list(module.children())}
    layers = [layer.name for layer in build("resnet50d").layers]
    extra = [name for name in layers if name not in modules]
    assert {name for name in modules if name not in layers} == {"layer1-0-downsample-0"}  # an Identity in torch
    assert all(name == "image" or name.endswith("-pad") for name in extra)


@pytest.mark.filterwarnings("ignore")  # Keras uses the older of torch's two exporters, which warns of much
def test_onnx_export_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, model = pair(shallow(FAMILY["resnet18_blur"].spec))
    fixed = build(shallow(FAMILY["resnet18_blur"].spec), 64)
    fixed.set_weights(model.get_weights())
    x = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    want = fixed(x, training=False).detach().numpy()
    fixed.export(tmp_path / "net.onnx", format="onnx", verbose=False)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    assert np.abs(session.run(None, {session.get_inputs()[0].name: x})[0] - want).max() < TOLERANCE * np.abs(want).max()


def test_build_takes_names_specs_changes_and_sizes() -> None:
    model = build("resnet20", 32, num_classes=7, in_channels=1)
    assert (model.name, model.input_shape, model.output_shape) == ("resnet20", (None, 32, 32, 1), (None, 7))
    assert build(reslab.spec("resnet20"), (40, 56)).get_layer("layer3-2-relu2").output.shape == (None, 10, 14, 64)
    for call, message in [
        (lambda: build("resnet21"), "unknown net 'resnet21'"),
        (lambda: build("resnet50", 16), "needs at least 32 px a side; received 16"),
        (lambda: build("skipblock8", 64), "fixes the image size at 32 px"),
    ]:
        with pytest.raises(reslab.CallError, match=message):
            call()


def test_channels_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    with pytest.raises(reslab.CallError, match="Keras is set to channels_first"):
        build("resnet20")


def test_example_reaches_97_percent_on_digits() -> None:
    done = subprocess.run([sys.executable, REPO / "examples" / "keras_digits.py"], capture_output=True, text=True, check=True, cwd=REPO)
    said = done.stdout.splitlines()[-1]
    assert float(said.split()[2].removesuffix("%,")) > 97, said


def _python(code: str, **environment: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}).stdout


def test_keras_is_loaded_where_it_is_used_and_its_absence_names_the_extra() -> None:
    assert _python("import reslab, reslab.nets, sys; print('keras' in sys.modules)") == "False\n"
    absent = "import sys; sys.modules['keras'] = None\ntry:\n    import reslab.nets.keras\nexcept Exception as e:\n    print(type(e).__name__, e)"
    assert _python(absent) == "WorkError this needs keras, which is not installed: pip install 'reslab[keras]'\n"


def test_torch_is_the_framework_unless_another_was_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert keras_backend._is_chosen()
    monkeypatch.setitem(sys.modules, "keras", keras)
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert not keras_backend._is_chosen()
    for held, chosen in (('{"backend": "tensorflow"}', False), ('{"backend": "jax"}', True), ("[]", False), ("nonsense", False)):
        (tmp_path / "keras.json").write_text(held)
        assert keras_backend._is_chosen() is chosen
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert keras_backend._is_chosen()


@pytest.mark.skipif(not __import__("importlib.util").util.find_spec("jax"), reason="JAX is not installed")
def test_keras_on_jax_equals_torch() -> None:
    rows = ["resnet20", "resnet18_blur", "se_resnet20", "preact_resnet50", "skipblock8", "resnet110_exclusive_gate"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.nets.parity", *rows], capture_output=True, text=True, check=True, cwd=REPO, env={**os.environ, "KERAS_BACKEND": "jax"}
    )
    assert all(float(line.split()[1]) < TOLERANCE for line in done.stdout.splitlines()) and len(done.stdout.splitlines()) == len(rows)


def test_a_net_whose_smallest_images_are_larger_than_its_reduction_is_built_without_a_size() -> None:
    spec = Spec("basic", (1,), (4,), "conv7-pool-valid", num_classes=2)
    assert spec.reduction == 4
    assert build(spec).output_shape == (None, 2)
    with pytest.raises(reslab.CallError, match="of images of 4 px maxpool leaves none"):
        build(spec, 4)
