"""A study's records -> study.html: one page, no network, no script."""

import importlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from reslab.errors import shown
from reslab.run import Record, write_whole


def write_study(target: Path, facts: dict[str, Any], records: list[Record]) -> Path:
    """Draws the page of one study. `facts` are name, study, answer, claims, data, size, protocol, command, cells, running, version, hardware."""
    figures = importlib.import_module(f"reslab.report.studies.{facts['name']}").figures(records)
    environment = Environment(loader=PackageLoader("reslab", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    page = environment.get_template("study.html.j2").render(**facts, figures=figures)
    write_whole(target, page.encode("utf-8", "backslashreplace"))
    return target
