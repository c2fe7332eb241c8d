"""The training loop, killed, interrupted, diverged and in two processes. Real processes and real digits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reslab
from reslab import job
from reslab.data.batches import Batches
from reslab.data.images import SPLITS
from reslab.data.source import open_images
from reslab.errors import CallError
from reslab.job import Silent
from reslab.run import UNFINISHED, Run
from reslab.train import fit, plan
from reslab.train.checkpoint import Checkpointed
from reslab.train.fit import Training
from reslab.train.hardware import machine
from reslab.use.own import own_images

SHORT = ("--epochs", "3", "--batch-size", "32", "--seed", "7")


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "reslab", "train", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment}, preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),  # what starts the tests may ignore it
    )  # fmt: skip


def saved_step(run: Path) -> int:
    """The step that a crash now would resume from; -1 before the first state."""
    try:
        with (run / "state" / "last.safetensors").open("rb") as held:  # one open file: it is replaced while we look
            header = json.loads(held.read(int.from_bytes(held.read(8), "little")))
        return int(json.loads(header["__metadata__"]["reslab"])["step"])
    except FileNotFoundError:
        return -1


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None and saved_step(run) < step:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    reslab.train("digits", out=out, epochs=3, batch_size=32, seed=7)
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "weights.safetensors")


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(uninterrupted: Path, tmp_path: Path, cli: Callable) -> None:
    out = tmp_path / "run"
    process = start("digits", "--out", out, *SHORT, "--save-every", "0")
    wait_for_step(out, random.Random().randrange(3, 60), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "model").exists()
    (out / "state" / f"{UNFINISHED}left").mkdir()  # a kill in the middle of writing leaves one
    done = cli("train", "--resume", out)
    assert done.returncode == 0, done.stderr
    step = int(done.stdout.split("at step ")[1].split(" ")[0])
    assert 0 <= step < 3 * 39
    ours, theirs = weights(out), weights(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), f"killed after step {step}"
    assert Run(out).last("test")["top1"] == Run(uninterrupted).last("test")["top1"]
    assert not list(out.rglob(f"{UNFINISHED}*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_finish_the_step_save_and_exit(number: int, status: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start("digits", "--out", out, "--epochs", "400", "--batch-size", "32", "--save-every", "0")
    wait_for_step(out, 5, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.count("\n") == 1
    assert "the state is saved; continue with --resume" in errors
    assert saved_step(out) >= max(5, *(r["step"] for r in Run(out).records("step")))


def test_equal_seeds_give_equal_weights_and_others_do_not(uninterrupted: Path, tmp_path: Path) -> None:
    again = reslab.train("digits", out=tmp_path / "again", epochs=3, batch_size=32, seed=7)
    other = reslab.train("digits", out=tmp_path / "other", epochs=3, batch_size=32, seed=8)
    ours, theirs = weights(again.path), weights(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(weights(other.path)["conv1.weight"], theirs["conv1.weight"])


def test_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_state(tmp_path: Path) -> None:
    with pytest.raises(reslab.WorkError, match=r"loss must be finite; it was (nan|inf) at step \d+ with lr .* train into a new --out with --lr") as caught:
        reslab.train("digits", out=tmp_path / "run", optimizer="sgd", lr=1000.0, warmup=0.0, momentum=1.0, epochs=60, schedule="cosine")
    assert "\n" not in str(caught.value)
    held = load_file(tmp_path / "run" / "state" / "last.safetensors")
    assert all(torch.isfinite(t).all() for name, t in held.items() if name.startswith("net."))
    assert Run(tmp_path / "run").last("warning")["text"] == "the training diverged"


def test_every_option_of_a_step_trains(tmp_path: Path) -> None:
    run = reslab.train(
        "digits", out=tmp_path / "run", epochs=5, mixup=0.2, cutmix=1.0, ema=0.99, clip=1.0, label_smoothing=0.1, balance="weights", cutout=2,
        optimizer="adamw", lr=0.003, schedule="cosine", low_resolution=0.5, patience=4, precision="bf16", zero_init=True,
    )  # fmt: skip
    assert run.last("test")["top1"] > 0.3
    assert run.last("test")["precision"] == run.last("calibration")["precision"] == "bf16"
    assert "bf16 (as asked); tested in bf16" in (run.path / "report.html").read_text()
    sampled = reslab.train("digits", out=tmp_path / "sampled", epochs=1, balance="sampling", normalize="pixel-mean", crop="resized", keep="last")
    assert sampled.last("test")["n"] == 359
    assert sampled.last("test")["precision"] == "fp32"
    assert "; tested in fp32" in (sampled.path / "report.html").read_text()


def test_layers_that_draw_random_numbers_repeat_too(tmp_path: Path) -> None:
    spec, runs = reslab.spec("resnet20", drop_path=0.5, dropout=0.2), []
    for name in ("first", "second"):
        runs.append(weights(reslab.train("digits", net=spec, out=tmp_path / name, epochs=1, batch_size=64, seed=3).path))
        torch.rand(7)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize(
    "name", ["preact20", "wrn16-8", "se_resnet20", "skipblock8", "resnet18d", "resnet110_shortcut_gate", "resnet18_blur", "resnet110_rezero"]
)
def test_nets_of_every_kind_train_and_load_again(name: str, tmp_path: Path) -> None:
    spec = reslab.spec(name)
    spec = replace(spec, depths=(1,) * len(spec.depths), widths=(8, 16, 32, 64)[: len(spec.widths)], stem_width=0)
    run = reslab.train("digits", net=spec, out=tmp_path / "run", epochs=2, batch_size=64, lr=0.02)  # at 0.05 the skip block diverges for one seed in four
    assert list(run.records("epoch"))[-1]["loss"] < 2.3, "a guess among ten"
    assert reslab.load(run.path).spec == reslab.spec(spec).fit(8, 1, 10)


def test_a_net_that_flattens_its_map_has_one_size(tmp_path: Path) -> None:
    with pytest.raises(reslab.CallError, match=r"one image size; received --low-resolution 0\.5"):
        reslab.train("digits", net="skipblock8", out=tmp_path / "run", low_resolution=0.5)


def test_early_stopping_stops(tmp_path: Path) -> None:
    run = reslab.train("digits", out=tmp_path / "run", epochs=200, patience=2, lr=0.0)
    top1 = [r["top1"] for r in run.records("val")]
    assert len(top1) == top1.index(max(top1)) + 1 + 2


def test_a_held_rate_is_let_go_where_an_epoch_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "LOG_SECONDS", 0.0)
    run = reslab.train("digits", out=tmp_path / "run", batch_size=512, steps=12, warmup_lr=0.01, lr=0.05, warmup=0.0, val=0.3)
    assert run.config["plan"]["steps_per_epoch"] == 1
    rates = [record["lr"] for record in run.records("step")]
    held = rates.count(0.01)
    assert 1 <= held < 12
    assert rates[:held] == [0.01] * held
    errors = [1 - record["top1"] for record in run.records("epoch")]
    assert all(error >= fit.GENTLE_ERROR for error in errors[: held - 1])
    assert errors[held - 1] < fit.GENTLE_ERROR


def test_a_process_without_a_val_image_counts_none(folder: Path) -> None:
    images = open_images(folder)
    alone = SimpleNamespace(
        rank=2, world=3, autocast=lambda precision: nullcontext(), device=torch.device("cpu"), total=lambda sums: sums + torch.tensor([3.0, 1, 2, 2])
    )
    training = SimpleNamespace(
        average=None, net=reslab.build("resnet20", num_classes=3), val=Batches(images, np.arange(2), 24, "memory"), machine=alone,
        micro_batch=8, pixels_on=torch.device("cpu"), plan=SimpleNamespace(precision="fp32"),
    )  # fmt: skip
    facts = Training.evaluate(training)  # type: ignore[arg-type]
    assert (facts["loss"], facts["top1"], facts["n"]) == (1.5, 0.5, 2)


def test_trainings_that_begin_at_once_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with machine() as here, ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: job._claimed("digits", here), range(32)))
    assert len(set(claimed)) == 32
    assert all(path.is_dir() for path in claimed)


def test_a_memory_budget_given_to_a_run_that_resumes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(Silent):
        def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
            if step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reslab.train("digits", reslab.spec("resnet20", widths=(8,), depths=(1,)), tmp_path / "run", steps=10, save_every=0, show=Cut())
    written = (tmp_path / "run" / "run.toml").read_text()
    assert "compiled = false" in written
    (tmp_path / "run" / "run.toml").write_text(written.replace("compiled = false", "compiled = true"))
    limits = []
    monkeypatch.setattr(plan, "Checkpointed", lambda net, segments, memory: limits.append(memory) or Checkpointed(net, segments, memory))
    assert reslab.train(resume=tmp_path / "run", memory="4G").last("test")
    assert limits == [4 << 30]


def test_finetuning_starts_from_the_weights_and_freezing_keeps_the_trunk(uninterrupted: Path, tmp_path: Path) -> None:
    file = uninterrupted / "model" / "weights.safetensors"
    run = reslab.train("digits", out=tmp_path / "run", recipe="finetune", weights=str(file), freeze="trunk", epochs=1, seed=7)
    before, after = weights(uninterrupted), weights(run.path)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("fc."))
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    assert run.last("test")["top1"] > 0.9
    save_file(reslab.build("resnet20").state_dict(), tmp_path / "colour.safetensors")
    of_grey = reslab.train("digits", "resnet20", tmp_path / "grey", recipe="finetune", weights=str(tmp_path / "colour.safetensors"), steps=2)
    assert of_grey.config["spec"]["in_channels"] == 3
    assert of_grey.last("test")["n"] == 359


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def torchrun(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_do_the_steps_of_one_bit_for_bit(tmp_path: Path, cli: Callable) -> None:
    """57 steps of fp32, the last of them uphill. Batch norm sees micro-batches of 32: each process one of a batch, or one process both."""
    given = ("digits", "--epochs", "3", "--batch-size", "64", "--micro-batch", "32", "--seed", "7", "--precision", "fp32", "--sam", "0.1", "--sam-from", "0.8")
    two = torchrun("-m", "reslab", "train", *given, "--out", tmp_path / "two")
    alone = cli("train", *given, "--out", tmp_path / "one", OMP_NUM_THREADS="1")
    _, errors = two.communicate(timeout=200)
    assert two.returncode == 0, errors[-2000:]
    assert alone.returncode == 0, alone.stderr
    ours, theirs = Run(tmp_path / "two"), Run(tmp_path / "one")
    assert same(weights(ours.path), weights(theirs.path))
    for mine, other in zip(ours.records("epoch", "val"), theirs.records("epoch", "val"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)  # val is summed in other batches
        assert mine["top1"] == other["top1"]
    assert ours.last("val")["n"] == 179, "an odd number by two processes, and every image once"
    assert ours.config["hardware"]["processes"] == 2
    assert len(list(ours.records("plan"))) == len(list(ours.records("test"))) == 1, "one writer"


def test_a_killed_worker_is_started_again_and_nothing_is_lost(tmp_path: Path) -> None:
    out, given = tmp_path / "run", ("digits", "--epochs", "3", "--batch-size", "64", "--micro-batch", "32", "--seed", "7", "--precision", "fp32")
    agent = torchrun("--max-restarts", "1", "-m", "reslab", "train", *given, "--save-every", "0", "--out", out)
    wait_for_step(out, 20, agent)
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    try:
        _, errors = agent.communicate(timeout=200)
    finally:
        agent.terminate()
    assert agent.returncode == 0, errors[-2000:]
    run = Run(out)
    assert [r["epoch"] for r in run.records("epoch")] == [1, 2, 3]
    assert run.last("epoch")["step"] == 57
    whole = reslab.train("digits", out=tmp_path / "whole", epochs=3, batch_size=64, micro_batch=32, seed=7, precision="fp32")
    assert same(weights(out), weights(whole.path))


def test_batch_norm_may_see_fewer_images_than_a_micro_batch(tmp_path: Path) -> None:
    """The same steps as with micro-batches of that size."""
    given = {"steps": 6, "batch_size": 64, "seed": 7, "precision": "fp32", "crop": "none", "low_resolution": 0.0, "optimizer": "sgd", "lr": 0.02}
    parts = reslab.train("digits", out=tmp_path / "parts", micro_batch=16, **given)
    together = reslab.train("digits", out=tmp_path / "together", norm_batch=16, **given)
    whole = reslab.train("digits", out=tmp_path / "whole", **given)
    losses = [[record["loss"] for record in run.records("val")] for run in (parts, together, whole)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)
    with pytest.raises(reslab.CallError, match="equal parts; 64 images by 24 does not go: change --norm-batch"):
        reslab.train("digits", out=tmp_path / "run", batch_size=64, norm_batch=24)


def test_late_steps_may_take_their_gradient_uphill(tmp_path: Path) -> None:
    """The last of four steps does: weights differ, and running statistics are those of one pass a step."""
    given = {"steps": 4, "batch_size": 64, "seed": 7, "precision": "fp32", "optimizer": "sgd", "lr": 0.02, "warmup": 0.0, "schedule": "step", "keep": "last"}

    def after(name: str, **more: float) -> dict[str, torch.Tensor]:
        return weights(reslab.train("digits", out=tmp_path / name, **given, **more).path)

    plain, never, barely, late = (
        after("plain"),
        after("never", sam=0.3, sam_from=1.0),
        after("barely", sam=1e-9, sam_from=0.5),
        after("late", sam=0.3, sam_from=0.75),
    )
    assert same(plain, never)
    assert all(torch.allclose(plain[name], barely[name], atol=1e-5) for name in plain), "next to no radius is next to no difference"
    apart = {name for name in plain if not torch.allclose(plain[name], late[name], atol=1e-5)}
    assert "conv1.weight" in apart
    statistics = {name for name in plain if "running" in name}
    assert statistics, "the state has them"
    assert not statistics & apart, "the last step's forward pass is that of the plain training"
    assert all(torch.equal(plain[name], late[name]) for name in plain if "num_batches" in name)


def test_a_share_must_be_whole_micro_batches(tmp_path: Path) -> None:
    with pytest.raises(reslab.CallError, match="whole micro-batches; 64 by 24 does not go: change --micro-batch"):
        reslab.train("digits", out=tmp_path / "run", batch_size=64, micro_batch=24)


def test_curves_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = reslab.train("digits", out=tmp_path / "run", epochs=2, tensorboard=True)
    held = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.value for event in held.Scalars("val/top1")] == pytest.approx([r["top1"] for r in run.records("val")])


def test_wide_convolutions_take_winograds_algorithm_and_keep_it_when_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_better", lambda made, other: other)  # whichever is faster here

    class Cut(Silent):
        def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
            if step == 4:
                raise KeyboardInterrupt

    wide = reslab.spec("resnet20", widths=(128,), depths=(1,), stem_width=128)
    given = {"epochs": 1, "batch_size": 64, "optimizer": "sgd", "precision": "fp32", "seed": 7}
    whole, direct = (reslab.train("digits", wide, tmp_path / name, convolution=name, **given) for name in ("auto", "direct"))
    assert (whole.config["plan"]["winograd"], direct.config["plan"]["winograd"]) == (True, False)
    ours, theirs = weights(whole.path)["layer1.0.conv2.weight"], weights(direct.path)["layer1.0.conv2.weight"]
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    with pytest.raises(KeyboardInterrupt):
        reslab.train("digits", wide, tmp_path / "cut", save_every=0, show=Cut(), **given)
    written = (tmp_path / "cut" / "run.toml").read_text()
    assert "replayed = false" in written
    (tmp_path / "cut" / "run.toml").write_text(written.replace("replayed = false", "replayed = true"))  # as if a GPU had begun it
    resumed = reslab.train(resume=tmp_path / "cut")
    assert resumed.last("test")["top1"] == whole.last("test")["top1"]
    for name, tensor in weights(whole.path).items():
        assert torch.equal(tensor, weights(resumed.path)[name]), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the parts of torch that compiling loads
def test_a_compiled_net_trains_alike_and_is_compiled_again_when_resumed(tmp_path: Path) -> None:
    class Cut(Silent):
        def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None:
            if step == 4:
                raise KeyboardInterrupt

    tiny = reslab.spec("resnet20", widths=(8,), depths=(1,))
    given = {"epochs": 1, "batch_size": 64, "optimizer": "sgd", "lr": 0.01, "seed": 7, "val": 0.2}
    as_it_is = weights(reslab.train("digits", tiny, tmp_path / "eager", **given).path)
    with pytest.raises(KeyboardInterrupt):
        reslab.train("digits", tiny, tmp_path / "cut", compile="always", save_every=0, show=Cut(), **given)
    assert Run(tmp_path / "cut").config["plan"]["compiled"]
    run = reslab.train(resume=tmp_path / "cut")
    assert [len(own_images(run).split[name]) for name in SPLITS] == [1079, 359, 359], "val is the share that was asked for, still"
    resumed = weights(run.path)
    for name, tensor in as_it_is.items():
        torch.testing.assert_close(tensor, resumed[name], rtol=1e-2, atol=1e-3)
    assert not all(torch.equal(tensor, resumed[name]) for name, tensor in as_it_is.items()), "the same to the last bit: was it compiled?"


def test_a_whitened_stem_is_not_trained_and_mirror_images_are_looked_at_where_training_mirrors(tmp_path: Path) -> None:
    given = {"epochs": 1, "batch_size": 64, "seed": 7, "whiten": True, "tta": "mirror"}
    run = reslab.train("digits", "resnet20", tmp_path / "run", flip="random", **given)
    filters = weights(run.path)["conv1.weight"]
    assert torch.equal(filters[8:], -filters[:8]), "components and their negatives, as they were set"
    assert torch.equal(weights(run.path)["bn1.weight"], torch.ones(16)), "nor is its norm, whose gradient would be the dearest of all"
    assert torch.equal(weights(run.path)["bn1.bias"], torch.zeros(16))
    classifier = reslab.load(run.path)
    images = open_images("digits").array[:16]
    both = classifier.logits(images)
    assert np.allclose(both, classifier.logits(images[:, :, ::-1]), atol=1e-5), "a mirror image has the same answer"
    assert np.allclose(both, replace(classifier.model, inference={}).quick(images), atol=1e-4)
    assert any("2 views of an image, mirrored" in line for line in run.config["data"]["decisions"])
    upright = reslab.train("digits", "resnet20", tmp_path / "upright", **given)
    assert upright.config["recipe"]["tta"] == "none", "digits are not mirrored, neither in training nor in test"
    with pytest.raises(CallError, match="received --whiten and --weights: leave one out"):
        reslab.train("digits", "resnet20", tmp_path / "both", weights=str(run.model / "weights.safetensors"), **given)
    with pytest.raises(CallError, match="received --dirac and --weights: leave one out"):
        reslab.train("digits", "resnet20", tmp_path / "both", weights=str(run.model / "weights.safetensors"), dirac=True)
    with pytest.raises(CallError, match="received --zero-init or --no-zero-init, and --weights: leave one out"):
        reslab.train("digits", "resnet20", tmp_path / "both", weights=str(run.model / "weights.safetensors"), zero_init=False)


def test_top5_of_val_counts_five() -> None:
    class Fixed(torch.nn.Module):
        spec = SimpleNamespace(num_classes=7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.arange(7.0, 0.0, -1.0).expand(len(x), 7)

    batch = SimpleNamespace(pixels=torch.zeros(6, 1), labels=torch.tensor([0, 1, 4, 5, 6, 2]))
    val = SimpleNamespace(items=np.arange(6), epoch=lambda size, positions, device: [batch])
    here = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), autocast=lambda precision: nullcontext(), total=lambda sums: sums)
    made = SimpleNamespace(
        average=None, net=Fixed(), val=val, machine=here, micro_batch=8, pixels_on=None, plan=SimpleNamespace(precision="fp32"),
        preprocess=lambda pixels, device: pixels,
    )  # fmt: skip
    facts = Training.evaluate(made)  # type: ignore[arg-type]
    assert (facts["n"], facts["top1"], facts["top5"]) == (6, pytest.approx(1 / 6), pytest.approx(4 / 6))
