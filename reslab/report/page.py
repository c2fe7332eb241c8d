"""A run's records -> report.html: one page, no network, no script. A report never trains and never opens the data."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from reslab.errors import CallError, WorkError, shown
from reslab.interval import limit, percent
from reslab.report import figures
from reslab.run import Record, Run, write_whole

TABLE_CLASSES = 20  # up to which the confusion matrix is a table
LISTED_CLASSES = 200
PAIRS = 6


def write_report(run: Run) -> Path:
    """Writes report.html and returns its path. Raises CallError when the run has no test result yet, and for a shipped net."""
    if run.is_shipped:
        raise CallError(f"a report is drawn into a run of your own; {shown(run.path)} came with reslab: copy it, and name the copy")
    test = run.last("test")
    if test is None:
        raise CallError(f"a report needs a finished run; {shown(run.path)} has no test result: `reslab train --resume {shown(run.path)}`")
    environment = Environment(loader=PackageLoader("reslab", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "limit": limit, "number": lambda n: f"{n:,}", "shown": shown}
    try:
        page = environment.get_template("page.html.j2").render(_facts(run, test))
    except (LookupError, TypeError, ValueError, ArithmeticError, StopIteration, UndefinedError) as error:
        raise WorkError(f"the records in {shown(run.path)} are damaged: {shown(repr(error))[:120]}; restore log.jsonl and run.toml") from error
    target = run.path / "report.html"
    write_whole(target, page.encode("utf-8", "backslashreplace"))
    return target


def _facts(run: Run, test: Record) -> dict[str, Any]:
    """All that the page shows."""
    config = run.config
    classes = config["data"]["classes"]
    epochs, val, steps = _once(run, "epoch", "epoch"), _once(run, "val", "epoch"), _once(run, "step", "step")
    tested = _since_last(list(run.records()), "calibration")
    mistakes = [r for r in tested if r["kind"] == "mistake"]
    suspects = [r for r in tested if r["kind"] == "suspect"]
    return {
        "config": config,
        "classes": classes,
        "test": test,
        "calibration": run.last("calibration"),
        "curves": figures.curves(epochs, val, steps) if epochs else "",
        "reliability": figures.calibration(test),
        "matrix": _matrix(test, len(classes)) if len(classes) <= TABLE_CLASSES else None,
        "map": figures.confusion(test["confusion"], classes) if len(classes) > TABLE_CLASSES else "",
        "per_class": sorted(test["classes"], key=lambda row: (row["n"] == 0, row["f1"]))[:LISTED_CLASSES],
        "pairs": _pairs(test, classes, mistakes),
        "worst": [{"overlay": "", **m} for m in mistakes if m["why"] == "worst"],  # runs of before heat maps have none
        "suspects": sorted(suspects, key=lambda s: s["label_probability"] - s["probability"])[:12],
        "warnings": list(dict.fromkeys(w["text"] for w in run.records("warning"))),
        "epochs": epochs,
        "best_epoch": (run.last("calibration") or {}).get("epoch"),
        "seconds": max((r["time"] for r in run.records("end", "test")), default=0.0),
        "train_seconds": epochs[-1]["seconds"] if epochs else 0.0,
        "images_a_second": _speed(epochs, config),
        "weakest": min((row for row in test["classes"] if row["n"]), key=lambda row: row["f1"], default=None),
    }


def _once(run: Run, kind: str, number: str) -> list[Record]:
    """The records of a kind; of those with the same number, which a crash before the state was saved leaves twice, the last."""
    return list({record[number]: record for record in run.records(kind)}.values())


def _since_last(records: list[Record], kind: str) -> list[Record]:
    """From the newest record of that kind on: a test that was cut short and repeated leaves its records twice."""
    starts = [i for i, record in enumerate(records) if record["kind"] == kind]
    return records[starts[-1] :] if starts else records


def _matrix(test: Record, classes: int) -> list[list[dict[str, float]]]:
    counts = [[0] * classes for _ in range(classes)]
    for label, predicted, count in test["confusion"]:
        counts[label][predicted] = count
    totals = [max(1, sum(row)) for row in counts]
    return [[{"count": n, "share": n / totals[i]} for n in row] for i, row in enumerate(counts)]


def _pairs(test: Record, classes: list[str], mistakes: list[Record]) -> list[dict[str, Any]]:
    """The most frequent mistakes, each with images of it."""
    ranked = sorted((cell for cell in test["confusion"] if cell[0] != cell[1]), key=lambda cell: -cell[2])[:PAIRS]
    rows = []
    for label, predicted, count in ranked:
        images = [m for m in mistakes if m["label"] == classes[label] and m["predicted"] == classes[predicted]][:4]
        total = next(row["n"] for row in test["classes"] if row["class"] == classes[label])
        rows.append({"label": classes[label], "predicted": classes[predicted], "count": count, "share": count / total, "images": images})
    return rows


def _speed(epochs: list[Record], config: dict[str, Any]) -> float:
    images = epochs[-1]["step"] * config["recipe"]["batch_size"] if epochs else 0
    return images / epochs[-1]["seconds"] if epochs else 0.0
