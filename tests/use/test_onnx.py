"""A classifier from an exported file: the same answers, without torch; and files that others forged."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from starlette.testclient import TestClient

import reslab
from reslab.run import Run
from reslab.serve.metrics import Metrics, shared_rows
from reslab.serve.server import _published
from reslab.serve.service import Limits, Service
from reslab.use import inference
from reslab.use.formats import to_onnx, write_onnx
from reslab.use.onnx import OnnxModel
from tests.use.conftest import TINY, classifier_of, photos_of

WITHOUT_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "keras"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from reslab.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def exported(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    write_onnx(reslab.load(trained.path), file)
    return file


def without_torch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_an_exported_file_is_the_same_classifier(trained: Run, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("has_bf16", "has_int8"):  # the file is in fp32, and what ours would be in is a matter of speed
        monkeypatch.setattr(inference, name, lambda _: False)
    ours, theirs = reslab.load(trained.path), reslab.load(exported)
    for name in ("classes", "temperature", "sure", "spec"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert (theirs.preprocess.canvas, theirs.preprocess.channels) == (ours.preprocess.canvas, ours.preprocess.channels)
    files = sorted((photos_of(trained) / "green").iterdir())
    for a, b in zip(ours.predict(files), theirs.predict(files), strict=True):
        assert a.label == b.label
        assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-5)
    with pytest.raises(reslab.CallError, match="give the run folder"):
        _ = theirs.net


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("", 0), ("many", 0)])  # 0: all cores
def test_it_takes_as_many_threads_as_torch_would(exported: Path, said: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    model = reslab.load(exported).model
    assert isinstance(model, OnnxModel)
    assert model.session.get_session_options().intra_op_num_threads == threads


def test_an_exported_file_is_served(trained: Run, exported: Path) -> None:
    file = sorted((photos_of(trained) / "green").iterdir())[0]
    service = Service(reslab.load(exported), _published(exported), Limits(), Metrics(shared_rows(1)), None, True)
    with TestClient(service.app, base_url="http://localhost") as client:
        answer = client.post("/predict", content=file.read_bytes(), headers={"content-type": "image/png"})
        (found,) = answer.json()["predictions"]
        assert client.get("/model").json()["name"] == "model"
    (want,) = reslab.load(exported).predict([file])
    assert (found["label"], found["probability"]) == (want.label, pytest.approx(want.probability, abs=1e-6))


def test_heat_maps_of_an_exported_file_are_refused_in_one_line(trained: Run, exported: Path, here: Callable[..., Any]) -> None:
    done = here("explain", exported, photos_of(trained) / "green")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "an exported file has only its graph: give the run folder" in done.stderr


def test_predict_and_evaluate_work_where_torch_is_not_installed(trained: Run, exported: Path) -> None:
    photos = photos_of(trained)
    done = without_torch("predict", exported, photos / "red", "--json")
    assert done.returncode == 0, done.stderr
    want = reslab.load(trained.path).predict(sorted((photos / "red").iterdir()))
    got = {Path(row["image"]).name: row["label"] for row in json.loads(done.stdout)}
    assert got == {file.name: p.label for file, p in zip(sorted((photos / "red").iterdir()), want, strict=True)}
    scored = without_torch("evaluate", exported, photos, "--json")
    assert scored.returncode == 0, scored.stderr
    facts = json.loads(scored.stdout)
    assert (facts["n"], len(facts["classes"])) == (90, 3)
    alone = without_torch("evaluate", exported)
    assert (alone.returncode, "name the data too" in alone.stderr) == (2, True)
    folder = without_torch("predict", trained.path, photos / "red" / "1.png")
    assert (folder.returncode, folder.stderr.count("\n")) == (1, 1)
    assert "a run folder needs torch, which is not installed" in folder.stderr


def test_what_the_file_scores_is_what_the_run_scores(trained: Run, exported: Path) -> None:
    from reslab.use.rescore import evaluate

    photos = photos_of(trained)
    of_file, of_run = evaluate(exported, photos), evaluate(trained.path, photos)
    assert of_file["top1"] == of_run["top1"]
    assert of_file["loss"] == pytest.approx(of_run["loss"], rel=1e-5)
    assert not (exported.parent / "log.jsonl").exists()


def test_missing_onnxruntime_names_the_extra(exported: Path) -> None:
    code = "import sys; sys.modules['onnxruntime'] = None\nfrom reslab.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "predict", str(exported), "x.png"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "pip install 'reslab[export]'" in done.stderr


def test_telemetry_is_off_before_onnxruntime_is_imported(exported: Path) -> None:
    code = (
        "import sys, os\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime': print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import reslab; reslab.load(sys.argv[1])"
    )
    environment = {"PATH": "", "PYTHONPATH": str(Path(reslab.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, str(exported)], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


GRAPH: dict[str, bytes] = {}


def forged(change: Callable[[Any, dict[str, Any]], object], text: str | None = None) -> bytes:
    """An exported file in which the graph or the metadata are changed."""
    if not GRAPH:
        GRAPH["tiny"] = to_onnx(classifier_of(TINY))
    model = onnx.load_from_string(GRAPH["tiny"])
    facts = json.loads(model.metadata_props[0].value)
    change(model, facts)
    if model.metadata_props:
        model.metadata_props[0].value = json.dumps(facts) if text is None else text
    data: bytes = model.SerializeToString()
    return data


def _two_inputs(model: Any, facts: dict[str, Any]) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def _external(location: str) -> Callable[[Any, dict[str, Any]], None]:
    def change(model: Any, facts: dict[str, Any]) -> None:
        tensor = next(t for t in model.graph.initializer if t.name.endswith("fc.bias"))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "20")):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value

    return change


NOTHING: Callable[[Any, dict[str, Any]], object] = lambda model, facts: None  # noqa: E731


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "cannot run this"),
        (lambda: b"\x08\xff" * 500, "cannot run this"),
        (lambda: GRAPH["tiny"][:-2000] if GRAPH else forged(NOTHING)[:-2000], "is no model that"),
        (lambda: forged(lambda m, f: m.ClearField("metadata_props")), "no reslab metadata"),
        (lambda: forged(NOTHING, "{"), "not JSON"),
        (lambda: forged(NOTHING, "[" * 100_000), "not JSON"),
        (lambda: forged(NOTHING, "9" * 5000), "not JSON"),
        (lambda: forged(NOTHING, "[]"), "lack the spec"),
        (lambda: forged(lambda m, f: f.update(spec={"block": ["basic"]})), "is no model that"),
        (lambda: forged(lambda m, f: f["spec"].update(num_classes=6)), "6"),
        (lambda: forged(lambda m, f: f["spec"].update(depths=[10**9])), "whole numbers"),
        (lambda: forged(lambda m, f: f.update(classes="abcde")), "a list of texts"),
        (lambda: forged(lambda m, f: f.update(classes=list("abcd"))), "4 class names, 5 outputs"),
        (lambda: forged(lambda m, f: f.update(temperature=0)), "temperature 0"),
        (lambda: forged(lambda m, f: f.update(temperature="NaN")), "temperature nan"),
        (lambda: forged(lambda m, f: f.update(sure=2)), "sure 2"),
        (lambda: forged(lambda m, f: f["preprocess"].update(canvas=10**9)), "sizes"),
        (lambda: forged(lambda m, f: f["preprocess"].update(canvas="32")), "sizes"),
        (lambda: forged(lambda m, f: f["preprocess"].update(channels=1)), "must take uint8"),
        (lambda: forged(lambda m, f: f["preprocess"].pop("canvas")), "canvas"),
        (lambda: forged(_two_inputs), "must take uint8"),
        (lambda: forged(lambda m, f: m.graph.output.pop()), "give logits"),
        (lambda: forged(_external("/etc/hostname")), "cannot run this"),
        (lambda: forged(_external("../beside.bin")), "cannot run this"),
        (lambda: forged(_external("beside.bin")), "cannot run this"),
    ],
)  # fmt: skip
def test_a_foreign_or_forged_file_is_one_line(make: Callable[[], bytes], message: str, tmp_path: Path) -> None:
    (tmp_path / "beside.bin").write_bytes(np.zeros(5, np.float32).tobytes())
    (tmp_path / "forged.onnx").write_bytes(make())
    with pytest.raises(reslab.WorkError, match=message) as caught:
        reslab.load(tmp_path / "forged.onnx")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_missing_file_is_a_wrong_call(tmp_path: Path) -> None:
    with pytest.raises(reslab.CallError, match="No such file"):
        reslab.load(tmp_path / "none.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(reslab.CallError, match="Is a directory"):
        reslab.load(tmp_path / "folder.onnx")
