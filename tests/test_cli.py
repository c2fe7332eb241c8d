"""Every bad input of a person at a terminal: one line on stderr, the right exit status, nothing lost, no traceback."""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import reslab
from reslab.cli import app
from tests.conftest import COLOURS, draw
from tests.data.test_decode import bomb

Cli = Callable[..., subprocess.CompletedProcess[str]]


def one_line(done: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    assert done.returncode == status, done.stderr + done.stdout
    assert done.stderr.startswith("reslab: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for part in parts:
        assert part in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "digits", "--net", "resnet19"], "did you mean 'resnet1"),
        (["train", "digit"], "did you mean 'digits'"),
        (["train", "digits", "--recipe", "quik"], "did you mean 'quick'"),
        (["train", "digits", "--learning-rat", "1"], "--learning-rat"),
        (["train", "digits", "--epohcs", "1"], "Did you mean --epochs"),
        (["train", "digits", "--lr", "fast"], "--lr"),
        (["train", "digits", "--lr", "-1"], "lr must be from 0 to 1000"),
        (["train", "digits", "--lr", "none"], "--lr"),
        (["train", "digits", "--epochs", "null"], "--epochs"),
        (["train", "digits", "--fuse", "none"], '"auto", "never"'),
        (["report", "resnet20-cifar10"], "came with reslab"),
        (["export", "resnet20-cifar10", "--to", "torch"], "say where with --out"),
        (["train", "digits", "--epochs", "0"], "epochs must be from 1"),
        (["train", "digits", "--budget", "soon"], "--budget must be a time"),
        (["train", "digits", "--budget", "1s"], "the budget must allow one epoch"),
        (["train", "digits", "--batch-size", "5000"], "a batch must not be larger than the training data"),
        (["train", "digits", "--net", "resnet18", "--image-size", "4"], "needs at least 8 px a side; received 4 px"),
        (["train", "nowhere/photos.csv"], "there is no"),
        (["train", "--resume", "nowhere"], "has no run.toml"),
        (["check", "nowhere"], "unknown data set or folder"),
        (["predict", "nowhere", "x.png"], "a finished run has model/spec.json"),
        (["predict", "nowhere"], "predict needs image files"),
        (["report", "nowhere"], "has no run.toml"),
        (["evaluate", "nowhere"], "has no run.toml"),
        (["trian"], "Did you mean"),
        (["train", "digits", "--weights", "none.pth"], "weights must be a file"),
        (["models", "resnet19"], "did you mean 'resnet1"),
        (["models", "--sort", "size"], "--sort"),
        (["show", "resnet19"], "did you mean 'resnet1"),
        (["show", "nowhere/run"], "unknown net 'nowhere/run'"),
        (["show", "resnet20", "--batch", "0"], "--batch must be from 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_calls_exit_2_with_one_line_and_leave_nothing(words: Cli, arguments: list[str], part: str, tmp_path: Path) -> None:
    one_line(words(*arguments), 2, part)
    assert list((tmp_path / "work").iterdir()) == []


def _one_class(root: Path) -> None:
    for i in range(9):
        draw(root / "red" / f"{i}.png", COLOURS["red"], i)


def _lonely(root: Path) -> None:
    _one_class(root)
    draw(root / "blue" / "0.png", COLOURS["blue"], 99)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda r: None, "has none: put the images of each class"),
        (_one_class, "two classes or more"),
        (_lonely, "class 'blue' has 1"),
        (lambda r: [(r / c).mkdir() or (r / c / "x.jpg").write_text("text") for c in "ab"], "none of the 2 files"),
        (lambda r: [(r / c).mkdir() or (r / c / "x.png").write_bytes(bomb(50_000, 50_000)) for c in "ab"], "megapixels"),
    ],
    ids=["empty", "one class", "a class with one image", "text files", "bombs"],
)
def test_unusable_data_exits_1_with_one_line(cli: Cli, make: Callable[[Path], object], part: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    make(root)
    one_line(cli("train", root), 1, part)
    assert not (tmp_path / "work" / "runs").exists()


def test_weights_of_another_net_or_kind_are_refused(words: Cli, tmp_path: Path) -> None:
    torch.save(reslab.build("resnet32", in_channels=1).state_dict(), tmp_path / "other.pth")
    one_line(words("train", "digits", "--net", "resnet20", "--weights", tmp_path / "other.pth"), 2, "another net's weights")
    (tmp_path / "page.pth").write_text("<html>sign in</html>")
    one_line(words("train", "digits", "--weights", tmp_path / "page.pth"), 1, "is a web page")
    assert list((tmp_path / "work").iterdir()) == []


def test_output_folders_in_use_or_out_of_reach_are_refused(words: Cli, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("precious")
    one_line(words("train", "digits", "--out", tmp_path / "used"), 2, "must be a new or empty folder")
    assert (tmp_path / "used" / "thesis.txt").read_text() == "precious"
    one_line(words("train", "digits", "--out", tmp_path / "used" / "thesis.txt" / "run"), 2, "--out must be writable")
    one_line(words("train", "digits", "--out", "/proc/run"), 2, "--out must be writable")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder that failed in the middle, as a full disk would make it."""
    root = tmp_path_factory.mktemp("made")
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(20):
            draw(root / "photos" / name / f"{i}.png", colour, 100 * c + i)
    with pytest.raises(reslab.WorkError):
        reslab.train(root / "photos", out=root / "run", optimizer="sgd", lr=1000.0, warmup=0.0, momentum=1.0, epochs=300, schedule="cosine")
    return root / "run"


def test_resuming_something_else_is_refused(words: Cli, stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    one_line(words("train", "--resume", tmp_path / "plain"), 2, "has no run.toml")
    one_line(words("train", "--resume", stopped, "--net", "resnet32"), 2, "keeps its net resnet20; received resnet32")
    one_line(words("train", "cifar10", "--resume", stopped), 2, "keeps its data")
    one_line(words("train", "--resume", stopped, "--lr", "0.5"), 2, "keeps its recipe; received lr 0.5")
    draw(stopped.parent / "photos" / "red" / "3.png", (0, 0, 0), 12345)
    one_line(words("train", "--resume", stopped), 1, "has changed since")


def test_finished_and_damaged_runs_are_not_resumed(words: Cli, tmp_path: Path) -> None:
    run = reslab.train("digits", out=tmp_path / "run", epochs=1)
    one_line(words("train", "--resume", run.path), 2, "a finished run cannot be resumed")
    (run.model / "spec.json").unlink()
    (run.path / "state" / "last.safetensors").write_bytes(b"\xff" * 64)
    one_line(words("train", "--resume", run.path), 1, "cannot be read as")
    whole = (run.path / "run.toml").read_text()
    (run.path / "run.toml").write_text(whole.replace('storage = "memory', 'storage = 3 # "'))
    one_line(words("train", "--resume", run.path), 1, "run.toml is damaged")
    (run.path / "run.toml").write_text("spec = [")
    one_line(words("train", "--resume", run.path), 1, "cannot be read")


def test_a_full_disk_is_one_line_and_the_last_good_state_is_kept(tmp_path: Path) -> None:
    """A limit on file size stands in for the full disk: the state (2 MB) no longer fits, the records do."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))

    out = tmp_path / "run"
    command = [sys.executable, "-m", "reslab", "train", "digits", "--epochs", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=200)
    one_line(done, 1, "last.safetensors cannot be written: File too large; what was there is kept")
    assert not list(out.rglob("*.tmp")), "nothing half-written may be left"


def test_debug_adds_the_traceback(cli: Cli) -> None:
    done = cli("train", "digits", "--net", "resnet19", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_missing_extra_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['kornia'] = None; sys.modules['torch.utils.tensorboard'] = None\nfrom reslab.cli import main; main(sys.argv[1:])"
    for option, extra in ((["--randaugment", "2"], "aug"), (["--tensorboard"], "tensorboard")):
        call = [sys.executable, "-c", code, "train", "digits", *option, "--out", str(tmp_path / extra)]
        one_line(subprocess.run(call, capture_output=True, text=True, timeout=200), 1, f"pip install 'reslab[{extra}]'")
        assert not (tmp_path / extra).exists(), "said before anything is written"


def test_odd_names_train_predict_and_stay_on_their_line(cli: Cli, tmp_path: Path) -> None:
    root = tmp_path / "my photos 🦊"
    for c, (name, colour) in enumerate({"new\nline": (200, 40, 40), "[red]markup": (50, 70, 200)}.items()):
        for i in range(12):
            draw(root / name / f"{i}\t<i>.png", colour, 100 * c + i)
    done = cli("train", root, "--epochs", "2", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    shown = cli("predict", tmp_path / "run", root)
    assert shown.returncode == 0, shown.stderr
    assert "[red]markup" in shown.stdout
    assert "new\\nline" in shown.stdout
    assert set(json.loads((tmp_path / "run" / "model" / "classes.json").read_text())) == {"new\nline", "[red]markup"}


def test_help_and_models_work(cli: Cli) -> None:
    shown = cli("--help")
    assert shown.returncode == 0
    words = {line.strip("│ ").partition(" ")[0] for line in shown.stdout.splitlines()}
    verbs = {"train", "check", "shard", "predict", "explain", "features", "evaluate", "export", "report", "study", "serve", "models", "show"}
    assert verbs <= words
    table = cli("models")
    assert "25,557,032" in table.stdout
    layers = cli("show", "resnet50", "--all")
    assert "layer4.2.bn3" in layers.stdout
    assert "25,557,032 parameters, 4,089,184,256 multiply-adds" in layers.stdout
    assert cli("show", "resnet51").returncode == 2
    assert "resnet20-cifar10 at 32 px" in cli("show", "resnet20-cifar10").stdout, "a net that comes with reslab"


def test_models_and_show_print_tables_json_and_a_drawing(cli: Cli, tmp_path: Path) -> None:
    assert [row["name"] for row in json.loads(cli("models", "plain*", "--max-params", "300k", "--json").stdout)] == ["plain20"]
    done = cli("show", "resnet20", "--batch", "8", "--svg", "nets/resnet20.svg", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "for a batch of 8" in done.stdout
    assert (tmp_path / "work" / "nets" / "resnet20.svg").read_text("utf-8").startswith("<svg xmlns")
    assert json.loads(cli("show", "resnet20", "--image-size", "64", "--json").stdout)["cost"]["macs"] > 4 * 40_000_000
    one_line(cli("show", "resnet20", "--svg", "nets"), 1, "nets cannot be written")


def test_a_choice_that_is_called_none_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: dict[str, object] = {}
    monkeypatch.setattr("reslab.job.train", lambda *words, **options: caught.update(options))
    monkeypatch.setenv("RANK", "1")  # which prints nothing
    app(["train", "digits", "--flip", "none", "--crop", "none", "--epochs", "3"])
    assert {name: caught[name] for name in ("flip", "crop", "epochs")} == {"flip": "none", "crop": "none", "epochs": 3}
    assert not {"lr", "seed", "milestones"} & set(caught), "what is not said is left to the recipe"


@pytest.mark.parametrize("arguments", [["--version"], ["models", "resnet20"]])
def test_closed_streams_are_no_failure(arguments: list[str]) -> None:
    done = subprocess.run(["sh", "-c", '"$0" -m reslab "$@" >&-', sys.executable, *arguments], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.run(["sh", "-c", '"$0" -m reslab models none-such 2>&-', sys.executable], stdout=subprocess.DEVNULL).returncode == 2


def test_a_stream_that_lacks_a_letter_shows_it_escaped(cli: Cli, tmp_path: Path) -> None:
    for c, name in enumerate(("café", "tea")):
        for i in range(3):
            draw(tmp_path / "photos" / name / f"{i}.png", COLOURS["red"], 10 * c + i)
    done = cli("check", tmp_path / "photos", PYTHONIOENCODING="ascii")
    assert "unexpected" not in done.stderr
    assert "caf\\xe9" in done.stdout


@pytest.mark.parametrize(("number", "status", "told"), [(signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, ""), (signal.SIGINT, 130, "reslab: stopped\n")])
def test_signals_put_away_what_is_half_written(number: signal.Signals, status: int, told: str, tmp_path: Path) -> None:
    code = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what starts the tests may ignore each of them
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from reslab import cli
from reslab.run import workplace
@cli.app.command
def wait_for_it(out: Path) -> int:
    with workplace(out) as folder:
        (folder / "half").touch()
        os.kill(os.getpid(), int(sys.argv[3]))
        return 0
cli.main(sys.argv[1:3])
"""
    call = [sys.executable, "-c", code, "wait-for-it", str(tmp_path / "out.csv"), str(int(number))]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (status, told)
    assert list(tmp_path.iterdir()) == []
