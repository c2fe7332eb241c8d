"""A run as a folder to give away: the model, a card that says what it is and how far to trust it, and what the Hub expects.

README.md carries the card in Markdown under YAML front matter, card.html the same for a browser. What was typed or named
on this machine is shortened to names: no path of it is given away, and no image.
"""

import json
import os
import re
import shlex
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from reslab.errors import CallError, WorkError, needs_extra, shown
from reslab.interval import limit, percent
from reslab.run import Record, Run, workplace
from reslab.use.artefact import FILES, model_files
from reslab.use.classifier import Classifier, load

MARK = "card.html"  # by it a folder is known as a card
WEAKEST, PAIRS = 5, 5  # classes and confusions that the card names
MARKDOWN = re.compile(r"([\\`*_\[\]<>|~#&!$])")


def write_card(path: str | Path, out: str | Path | None = None) -> Path:
    """Writes the folder, by default RUN/export/card, and returns it. Exported .onnx files of the run come along.

    A card that is there gives way; what else is in its folder stays.
    Raises CallError for an unfinished run or a folder in use, WorkError when records are damaged or it cannot be written.
    """
    run = Run.open(path)
    if run.is_shipped:
        raise CallError(f"a card is made of a run of your own; {shown(path)} came with reslab and has one: {shown(run.path / 'README.md')}")
    classifier = load(run.path)
    target = Path(out) if out is not None else run.path / "export" / "card"
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MARK).is_file())):
        raise CallError(f"--out must be a new folder or a card; {shown(target)} is neither: choose another")
    pages = _pages(run, classifier)
    with workplace(target) as folder:
        for file in [*model_files(run.path), *_exports(run.path / "export")]:
            shutil.copyfile(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(_config(classifier), indent=1), "utf-8")
        for name, page in pages.items():
            (folder / name).write_bytes(page.encode("utf-8", "backslashreplace"))
        target.mkdir(exist_ok=True)
        for file in _made_before(target):  # first, so that no moment has new weights beside an old card
            file.unlink()
        for file in sorted(folder.iterdir(), key=lambda file: (file.name != MARK, file.name)):
            file.replace(target / file.name)
    return target


def publish(folder: Path, repository: str, api: Any = None) -> str:
    """Uploads a card's folder to the Hugging Face Hub as owner/name and returns its address. Only ever called by name.

    The token is the one that `hf auth login` stored or HF_TOKEN holds. Raises CallError for a name that cannot be,
    WorkError when the Hub refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise CallError(f"--push must be owner/name; received {shown(repository)!r}")
    api = api or _hub()
    try:
        address = api.create_repo(repo_id=repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model and card by reslab")
    except Exception as error:  # of the Hub, of HTTP, of the network
        raise WorkError(f"the Hub did not take {shown(repository)}: {shown(str(error))[:200]}; the folder is in {shown(folder)}") from error
    return str(address)


def _hub() -> Any:
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise needs_extra("huggingface_hub", "hub") from error
    return HfApi()


def _config(classifier: Classifier) -> dict[str, Any]:
    """config.json as the Hub's tools know it; the spec is what `reslab` reads, from its own file."""
    frame, classes = classifier.preprocess, classifier.classes
    return {
        "model_type": "reslab", "architectures": ["ResNet"], "image_size": frame.canvas, "num_channels": frame.channels, "num_labels": len(classes),
        "id2label": {str(i): name for i, name in enumerate(classes)}, "label2id": {name: i for i, name in enumerate(classes)}, "spec": asdict(classifier.spec),
    }  # fmt: skip


def _made_before(card: Path) -> list[Path]:
    """What an earlier card left in its folder, README.md last: it names the exports that are the card's and not somebody's own.

    MARK is not among them: without it a folder that was left half-way would be no card any more, and refused.
    """
    readme = card / "README.md"
    named = readme.read_text("utf-8", "replace") if readme.is_file() else ""
    exports = [file for file in _exports(card) if f"`{file.name}`" in named]
    return [*exports, *(file for name in (*FILES, "config.json", readme.name) if (file := card / name).is_file())]


def _exports(folder: Path) -> list[Path]:
    """The .onnx files that `reslab export` left, and what it found of them."""
    files = [file for file in sorted(folder.glob("*.onnx")) if file.with_name(file.name + ".json").is_file()]
    return [path for file in files for path in (file, file.with_name(file.name + ".json"))]


def _pages(run: Run, classifier: Classifier) -> dict[str, str]:
    environment = Environment(
        loader=PackageLoader("reslab", "use"), undefined=StrictUndefined,
        autoescape=lambda name: str(name).startswith("card.html"),  # noqa: S701  # Markdown has its own escape, the filter md
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": partial(percent, digits=2, space=" "),
        "limit": partial(limit, digits=2, space=" "),
        "shown": shown,
        "md": markdown,
        "number": lambda n: f"{n:,}",
    }
    test = run.last("test")
    if test is None:
        raise CallError(f"a card needs a finished run; {shown(run.path)} has no test result: `reslab train --resume {shown(run.path)}`")
    try:
        facts = _facts(run, test, classifier)
        front = json.dumps(_index(facts), ensure_ascii=False)
        return {
            "README.md": environment.get_template("card.md.j2").render(facts, index=front),
            MARK: environment.get_template("card.html.j2").render(facts),
        }
    except (LookupError, TypeError, ValueError, ArithmeticError, UndefinedError) as error:
        raise WorkError(f"the records in {shown(run.path)} are damaged: {shown(repr(error))[:120]}; restore log.jsonl and run.toml") from error


def _facts(run: Run, test: Record, classifier: Classifier) -> dict[str, Any]:
    """All that the card says."""
    config = run.config
    confused = sorted((cell for cell in test["confusion"] if cell[0] != cell[1]), key=lambda cell: -cell[2])[:PAIRS]
    support = {row["class"]: row["n"] for row in test["classes"]}
    names = classifier.classes
    return {
        "net": str(config["net"]),
        "data": Path(str(config["data"]["name"])).name,
        "parts": {name: config["data"][name] for name in ("train", "val", "test")},
        "classes": names,
        "frame": classifier.preprocess,
        "cost": classifier.spec.cost(classifier.preprocess.image_size),
        "test": test,
        "sure": classifier.sure,
        "temperature": classifier.temperature,
        "weakest": sorted((row for row in test["classes"] if row["n"]), key=lambda row: row["f1"])[:WEAKEST],
        "confused": [(names[label], names[predicted], count, support[names[label]]) for label, predicted, count in confused],
        "command": _without_paths(config["command"]),
        "hardware": config["hardware"],
        "versions": config["versions"],
        "minutes": max((record["time"] for record in run.records("end", "test")), default=0.0) / 60,
        "exports": [file.name for file in _exports(run.path / "export") if file.suffix == ".onnx"],
    }


def _index(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The Hub's `model-index`: the figures in a form that its pages read."""
    test, data = facts["test"], shown(facts["data"])
    metrics = [{"type": "accuracy", "name": f"top-1, 95 % interval {test['top1_low']:.4f} to {test['top1_high']:.4f}", "value": test["top1"]}]
    result = {"task": {"type": "image-classification"}, "dataset": {"name": data, "type": data, "split": "test"}, "metrics": metrics}
    return [{"name": f"{shown(facts['net'])} on {data}", "results": [result]}]


def _without_paths(command: str) -> str:
    """A command line whose paths are cut to their last name: where things lie on this machine is nobody's business."""
    try:
        return shlex.join(map(_public, shlex.split(command)))
    except ValueError:
        return "reslab train"


def _public(word: str) -> str:
    """A word of a command line; an address keeps no name, password or signature."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if value.startswith(("https://", "http://")):
        address = urlsplit(value)
        value = urlunsplit((address.scheme, address.netloc.rpartition("@")[2], address.path, "", ""))
    elif "/" in value and not value.startswith("hf:"):
        value = Path(value).name or "/"
    return option + equals + value


def markdown(text: object) -> str:
    """`text` as plain words in Markdown: one line, nothing in it is markup."""
    return MARKDOWN.sub(r"\\\1", shown(str(text)))
