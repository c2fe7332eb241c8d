"""A study's records -> study.html, one page without network or script; study.json; and each figure with its numbers."""

import importlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from reslab.errors import shown
from reslab.report.svg import standalone
from reslab.run import Record, write_whole


def write_study(target: Path, facts: dict[str, Any], records: list[Record]) -> Path:
    """Draws one study beside `target`.

    `facts` are name, study, answer, claims, data, size, protocol, command, seconds, cells, running, version, hardware.
    """
    figures = importlib.import_module(f"reslab.report.studies.{facts['name']}").figures(records)
    environment = Environment(loader=PackageLoader("reslab", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    page = environment.get_template("study.html.j2").render(**facts, figures=figures)
    for number, figure in enumerate(figures, start=1):
        write_whole(target.parent / "figures" / f"{number}.svg", standalone(figure.svg))
        write_whole(target.parent / "figures" / f"{number}.csv", figure.csv)
    plain = {key: value for key, value in facts.items() if key not in ("study", "claims")}
    told = {"question": facts["study"].question, **plain, "claims": [claim._asdict() for claim in facts["claims"]], "figures": [f.title for f in figures]}
    write_whole(target.with_suffix(".json"), json.dumps(told, indent=1).encode())
    write_whole(target, page.encode("utf-8", "backslashreplace"))
    return target
