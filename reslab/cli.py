"""The command `reslab`: one thin function a verb. Exit status 0 for success, 1 when the work failed, 2 for a wrong call."""

import contextlib
import json
import math
import os
import sys
import traceback
from dataclasses import field as dataclass_field
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import cyclopts
from cyclopts import App, Parameter

from reslab import __version__
from reslab.catalogue.models import Sort
from reslab.errors import CallError, WorkError, shown
from reslab.host import end_on_signals
from reslab.terminal import console, prepare_streams, print_checkup, print_result, print_scores, watch, width
from reslab.train.recipe import RECIPES, Recipe, helps

CLUSTER = "let a Ray cluster do it: its address, `auto` or `local` (extra `cluster`)"
app = App(
    name="reslab",
    help="The workbench for residual networks. Try: reslab train digits. With --debug an error shows where it arose.",
    help_format="plaintext",  # the others load a Markdown parser, which takes longer than all the rest
    version=__version__,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)


def _flags() -> type:
    """A dataclass with one field a Recipe field, which cyclopts shows as options."""
    hints = get_type_hints(Recipe)
    rows: list[Any] = []
    for f in fields(Recipe):
        kept = "" if f.default in (None, "") else f" (default {str(f.default).lower() if isinstance(f.default, bool) else f.default})"
        kinds = get_args(hints[f.name])  # without None, for which cyclopts takes the words none and null
        kind = kinds[0] if type(None) in kinds else hints[f.name]
        rows.append((f.name, Annotated[kind, Parameter(help=helps()[f.name].text + kept, show_default=False)], dataclass_field(default=None)))
    made = make_dataclass("Flags", rows, frozen=True, kw_only=True)
    made.__module__ = __name__  # cyclopts takes a class of the standard library for a plain value
    return made


Flags = _flags()
JsonFlag = Annotated[bool, Parameter(name="--json", negative="", help="print JSON")]


@app.command
def train(
    data: Annotated[str | None, Parameter(help="digits, cifar10, cifar100, mnist, fashion-mnist, a folder, a CSV of path,label, or shards")] = None,
    /,
    *,
    net: Annotated[str | None, Parameter(help="a name that `reslab models` lists; by default the recipe's, or resnet20 up to 64 px, else resnet18")] = None,
    out: Annotated[Path | None, Parameter(help="the run folder to make; by default below runs/")] = None,
    resume: Annotated[Path | None, Parameter(help="continue the run in this folder")] = None,
    budget: Annotated[str | None, Parameter(help="time for everything, such as 20m: as many epochs as fit")] = None,
    memory: Annotated[str | None, Parameter(help="what a process may hold, such as 4G: blocks are computed twice to keep to it; on a GPU, its tensors")] = None,
    recipe: Annotated[str, Parameter(help=f"{', '.join(RECIPES)}, or a .toml file of recipe fields")] = "quick",
    tensorboard: Annotated[bool, Parameter(negative="", help="also write the curves for TensorBoard (extra `tensorboard`)")] = False,
    flags: Annotated[Flags, Parameter(name="*", group="Recipe")] = Flags(),  # type: ignore[valid-type]  # noqa: B008
) -> int:
    """Train a classifier, test it once, write a run folder with a report."""
    from reslab.job import train as run_training

    given = {name: value for name, value in vars(flags).items() if value is not None}
    with watch() as show:
        run = run_training(data, net, out, resume=resume, recipe=recipe, budget=budget, memory=memory, tensorboard=tensorboard, show=show, **given)
    if int(os.environ.get("RANK", "0")) == 0:
        print_result(run)
    return 0


@app.command
def check(
    data: Annotated[str, Parameter(help="as for train")] = "digits",
    /,
    *,
    as_json: JsonFlag = False,
) -> int:
    """The data doctor: unreadable files, duplicates, leakage, imbalance. Exit status 1 when there is a problem."""
    from reslab.data.check import check as examine
    from reslab.data.source import open_images

    with watch() as show:
        images = open_images(data, show.reading)
        found = examine(images, show.reading)
    if as_json:
        print(json.dumps({"data": data, "images": len(images), **found.to_dict()}, indent=1))
    else:
        print_checkup(shown(images.name), len(images), found)
    return 0 if found.is_healthy else 1


@app.command
def shard(
    data: Annotated[Path, Parameter(help="a folder of images, or a CSV of path,label")],
    out: Annotated[Path, Parameter(help="a new or empty folder")],
    /,
    *,
    seed: Annotated[int, Parameter(help="of the order, and of the split where the images declare none")] = 0,
    shard_size: Annotated[float, Parameter(help="MiB from which a shard is full")] = 128.0,
) -> int:
    """Write images as WebDataset tar shards, which `reslab train OUT` and `reslab train https://.../shards.json` read."""
    from reslab.data.check import cheap_check
    from reslab.data.shards import write_shards
    from reslab.data.source import open_images

    with watch() as show:
        images = open_images(data, show.reading)
        for line in cheap_check(images):
            show.say(line)
        made = write_shards(images, out, seed, shard_size, show.reading)
    print(f"{shown(out)}: {sum(row['images'] for row in made['shards']):,} images in {len(made['shards']):,} shards")
    return 0


@app.command
def predict(
    run: Annotated[Path, Parameter(help="a run folder, its model/, or an exported .onnx file")],
    /,
    *images: Annotated[str, Parameter(help="files, folders or patterns such as 'photos/*.jpg'")],
    out: Annotated[Path | None, Parameter(help="write a .csv or .jsonl instead, for very many images")] = None,
    cluster: Annotated[str | None, Parameter(help=CLUSTER)] = None,
    as_json: JsonFlag = False,
) -> int:
    """The likeliest classes of images. Exit status 1 when one could not be read; the others are done."""
    from reslab.data.given import image_files
    from reslab.host import keep_freed_memory
    from reslab.use.classifier import load
    from reslab.use.predictions import check_out, print_json, print_tables, write_file

    if out is not None:
        check_out(out)
    paths = image_files(images, "predict")
    keep_freed_memory()
    if cluster is None:
        answers = load(run).predict_each(paths)
    else:
        from reslab.use.cluster import predict_each

        answers = predict_each(run, paths, cluster)
    if out is None:
        return 1 if (print_json(answers) if as_json else print_tables(answers, console())) else 0
    n, failed = write_file(answers, out)
    if as_json:
        print(json.dumps({"out": str(out), "images": n, "errors": failed}))
    else:
        print(f"{shown(out)}: {n:,} images, {failed:,} of them could not be read")
    return 1 if failed else 0


@app.command
def explain(
    run: Annotated[Path, Parameter(help="a run folder, or its model/")],
    /,
    *images: Annotated[str, Parameter(help="files, folders or patterns such as 'photos/*.jpg'")],
    method: Annotated[str, Parameter(help="grad-cam, grad-cam++, integrated-gradients or occlusion")] = "grad-cam",
    at: Annotated[str, Parameter(help="activations that grad-cam weighs: stem, a stage (layer3), a block (layer3.0) or last")] = "last",
    label: Annotated[str | None, Parameter(name="--class", help="the class to explain; by default the predicted one")] = None,
    neighbours: Annotated[int, Parameter(help="show that many of the run's training images, the nearest in feature space")] = 0,
    out: Annotated[Path | None, Parameter(help="a new or empty folder; by default explain/, numbered when that is taken")] = None,
    as_json: JsonFlag = False,
) -> int:
    """Heat maps over images, and a page of them. Exit status 1 when an image could not be read; the others are done."""
    from reslab.data.given import image_files
    from reslab.use.explained import explain_files
    from reslab.use.sheet import print_table

    paths = list(image_files(images, "explain"))
    with watch() as show:
        found = explain_files(run, paths, method, at, label, neighbours, out, show.reading)
    if as_json:
        print(json.dumps(found.facts(), indent=1))
    else:
        print_table(found, console())
    return 1 if found.failed else 0


@app.command
def features(
    run: Annotated[Path, Parameter(help="a run folder, or its model/")],
    /,
    *images: Annotated[str, Parameter(help="files, folders or patterns such as 'photos/*.jpg'")],
    out: Annotated[Path, Parameter(help="the .npz to write: paths, and features as float32 (images, features)")] = Path("features.npz"),
    as_json: JsonFlag = False,
) -> int:
    """What the net's head is given for images, as vectors. Exit status 1 when an image could not be read; the others are done."""
    from reslab.data.given import image_files
    from reslab.use.features import write_features

    n, length, failed = write_features(run, list(image_files(images, "features")), out)
    if as_json:
        errors = [{"image": str(path), "error": reason} for path, reason in failed.items()]
        print(json.dumps({"out": str(out) if n else None, "images": n, "features": length, "errors": errors}, indent=1))
    else:
        for path, reason in failed.items():
            print(f"left out {shown(path)}: {reason}")
        print(f"{shown(out)}: paths, features ({n:,} x {length:,})" if n else "nothing was written: no image could be read")
    return 1 if failed else 0


@app.command
def evaluate(
    run: Annotated[Path, Parameter(help="a run folder, or an exported .onnx file")],
    data: Annotated[str | None, Parameter(help="other labelled images; by default the run's own test part")] = None,
    /,
    *,
    as_json: JsonFlag = False,
) -> int:
    """Score a run on its test part again, or a run or an exported file on all of other labelled images."""
    from reslab.use.rescore import evaluate as evaluate_run

    with watch() as show:
        scores = evaluate_run(run, data, show.reading)
    if as_json:
        print(json.dumps(scores, indent=1))
    else:
        print_scores(scores)
    return 0


@app.command
def export(
    run: Annotated[Path, Parameter(help="a run folder, or its model/")],
    /,
    *,
    to: Annotated[str, Parameter(help="onnx, torch (torch.export), keras, openvino, or card: a folder to give away")],
    out: Annotated[Path | None, Parameter(help="the file to write, for card the folder; by default below RUN/export")] = None,
    int8: Annotated[bool, Parameter(negative="", help="ONNX or OpenVINO in 8 bits, refused unless it is faster and about as right")] = False,
    bf16: Annotated[bool, Parameter(negative="", help="ONNX in bfloat16, refused likewise")] = False,
    max_drop: Annotated[float, Parameter(help="points of val top-1 that --int8 or --bf16 may cost")] = 0.5,
    push: Annotated[str | None, Parameter(help="with --to card: publish it as owner/name on the Hugging Face Hub (extra `hub`)")] = None,
) -> int:
    """Write a run as a file for other programs, checked against the net on the run's val images, or random ones where these are gone."""
    if int8 and bf16:
        raise CallError("--int8 and --bf16 exclude each other; received both: choose one")
    if push is not None and to != "card":
        raise CallError(f"--push publishes a card; received --to {shown(to)}: give --to card")
    if to == "card":
        if int8 or bf16:
            raise CallError("--int8 and --bf16 are for --to onnx; received --to card: leave one of them out")
        from reslab.use.card import publish, write_card

        card = write_card(run, out)
        print(shown(card))
        if push is not None:
            print(shown(publish(card, push)))
        return 0
    from reslab.use.export import export as export_run
    from reslab.use.export import in_words

    with watch() as show:
        precision = "int8" if int8 else "bf16" if bf16 else "fp32"
        exported = export_run(run, to, out, precision=precision, max_drop=max_drop, reading=show.reading, say=show.say)
    print("\n".join(in_words(exported)))
    return 0


@app.command
def report(run: Annotated[Path, Parameter(help="a run folder")], /) -> int:
    """Draw report.html anew from a run's records."""
    from reslab.report.page import write_report
    from reslab.run import Run

    print(shown(write_report(Run.open(run))))
    return 0


@app.command
def study(
    name: Annotated[str | None, Parameter(help="a question that `reslab study` lists, or all")] = None,
    /,
    *runs: Annotated[Path, Parameter(help="trained runs to look at, for studies of trained nets; twins are compared")],
    data: Annotated[
        str | None, Parameter(help="as for train; by default digits, and from 5m cifar10 where it is at hand, or nets that come with reslab")
    ] = None,
    net: Annotated[str | None, Parameter(help="a name that `reslab models` lists, to vary; by default resnet20, above 64 px resnet18")] = None,
    budget: Annotated[str, Parameter(help="time such as 2m or 10m, or `paper` for the published protocol")] = "10m",
    image_size: Annotated[int | None, Parameter(help="pixels a side; by default the images' own, fewer for budgets below an hour")] = None,
    out: Annotated[Path | None, Parameter(help="the study's folder; by default below studies/. An interrupted study goes on there")] = None,
    seeds: Annotated[int, Parameter(help="trainings of each net")] = 3,
    jobs: Annotated[int | None, Parameter(help="processes; by default, and without --cluster at most, one a core")] = None,
    cluster: Annotated[str | None, Parameter(help=CLUSTER)] = None,
) -> int:
    """Answer a question about residual networks by measuring. Without a name: the list of questions."""
    from reslab.study import STUDIES

    if name is None:
        print("\n".join(f"{key:14}{question}" for key, question in STUDIES.items()))
        return 0
    from reslab.studies import Call, study_all
    from reslab.studies import study as run_study

    call = Call(data, runs, net, budget, image_size, out, seeds, jobs, cluster)
    with watch() as show:
        answered = study_all(call, show) if name == "all" else [(name, *run_study(name, call, show))]
    for each, page, claims in answered:
        for claim in claims:
            print(f"{each}, {claim.verdict}: {claim.paper}\n  {claim.measured}")
        print(f"page: {shown(page)}")
    return 0


@app.command
def serve(
    model: Annotated[Path, Parameter(help="a run folder, its model/, or an exported .onnx file")],
    /,
    *,
    host: Annotated[str, Parameter(help="address to answer on; any but loopback needs a token or --open")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="0 takes a free one")] = 8000,
    token: Annotated[str | None, Parameter(env_var="RESLAB_TOKEN", show_env_var=True, help="the secret that every request must bring")] = None,
    open_to_all: Annotated[bool, Parameter(name="--open", negative="", help="answer anyone, without a token")] = False,
    workers: Annotated[int, Parameter(help="processes that share the port")] = 1,
    batch: Annotated[int, Parameter(help="images that go through the net together, at most")] = 32,
    queue: Annotated[int, Parameter(help="images that wait, at most; above it the answer is 503")] = 128,
    timeout: Annotated[float, Parameter(help="seconds for an answer; above it, 504")] = 10.0,
    max_body: Annotated[float, Parameter(help="MiB of a request; above it, 413")] = 32.0,
) -> int:
    """Answer HTTP requests with a classifier, and show its page (extra `serve`)."""
    from reslab.serve.server import Settings
    from reslab.serve.server import serve as start
    from reslab.serve.service import Limits

    limits = Limits(round(max_body * 2**20) if math.isfinite(max_body) else 0, queue, batch, timeout)
    start(Settings(model, host, port, token, open_to_all, workers, limits), lambda line: print(line, flush=True))
    return 0


@app.command
def models(
    *patterns: Annotated[str, Parameter(help="names, globs such as 'se_*', or text in where a net is from")],
    sort: Annotated[Sort | None, Parameter(help="by default as they were published")] = None,
    image_size: Annotated[int | None, Parameter(help="only nets published for images of so many pixels a side: 32 for CIFAR, 224 for ImageNet")] = None,
    max_params: Annotated[str | None, Parameter(help="only nets with at most so many parameters, such as 5M")] = None,
    as_json: JsonFlag = False,
) -> int:
    """The family as a table: parameters, multiply-adds, published top-1 and its source."""
    from reslab.catalogue.models import listing
    from reslab.catalogue.models import models as find_models

    found = find_models(patterns, sort, image_size, max_params)
    if as_json:
        print(json.dumps([model.to_dict() for model in found], indent=1))
    else:
        print("\n".join(listing(found, width())))
    return 0


@app.command
def show(
    name: Annotated[str, Parameter(help="a name that `reslab models` lists, or a run folder")],
    /,
    *,
    image_size: Annotated[int | None, Parameter(help="pixels a side; by default what the net was published for, or trained on")] = None,
    batch: Annotated[int, Parameter(help="images for which memory is told")] = 32,
    whole: Annotated[bool, Parameter(name="--all", negative="", help="tell every block, also those equal to the one before")] = False,
    svg: Annotated[Path | None, Parameter(help="also draw the net into this file")] = None,
    as_json: JsonFlag = False,
) -> int:
    """One network, layer by layer: output, parameters, multiply-adds, receptive field; and the memory it needs."""
    from reslab.catalogue.sheet import find, sheet, to_dict
    from reslab.family import FAMILY

    if name not in FAMILY and not Path(name).exists():
        from reslab.run import located

        name = str(located(name))  # of a net that comes with reslab
    subject = find(name, image_size)
    if not 1 <= batch <= 1 << 20:
        raise CallError(f"--batch must be from 1 to {1 << 20}; received {batch}")
    if svg:
        from reslab.catalogue.drawing import drawing
        from reslab.run import write_whole

        write_whole(svg, drawing(*subject).encode())
    if as_json:
        print(json.dumps(to_dict(subject, batch), indent=1))
    else:
        print("\n".join(sheet(subject, batch, whole, width())))
    return 0


def main(tokens: list[str] | None = None) -> None:
    """Runs a command line and exits. An error is one line on stderr; `--debug` adds the traceback."""
    prepare_streams()
    end_on_signals()
    given = sys.argv[1:] if tokens is None else tokens
    tokens = [word for word in given if word != "--debug"]
    try:
        sys.exit(app(tokens or ["--help"]) or 0)
    except (SystemExit, BrokenPipeError) as error:
        code = error.code if isinstance(error, SystemExit) else 1
    except KeyboardInterrupt:
        code = _complain("stopped", 130)
    except Exception as error:
        if "--debug" in given:
            traceback.print_exc()
        code = _complain(*_explain(error))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)


def _explain(error: Exception) -> tuple[str, int]:
    """The line and the exit status for an error."""
    if isinstance(error, cyclopts.CycloptsError):
        return " ".join(str(error).split()) + " (`reslab --help` shows what there is)", 2
    if isinstance(error, CallError | WorkError):
        return str(error), 2 if isinstance(error, CallError) else 1
    if (number := getattr(error, "signal", None)) is not None:  # Interrupted; its module loads torch
        return f"{error}; continue with --resume", 128 + int(number)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {shown(str(error.filename))}" if error.filename else ""), 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "the memory must suffice; it ran out: choose a smaller net or --image-size, fewer images at a time, or, for train, --memory", 1
    return f"unexpected {type(error).__name__}: {shown(str(error))[:300]}; --debug shows where", 1


def _complain(line: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print(f"reslab: {' '.join(line.splitlines())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
