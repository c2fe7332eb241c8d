"""docs/studies.md says what the studies say now of the records that were kept.

After a change of a claim's rule or words, or of a figure, `python -m tests.study.test_gallery` writes its answers, claims and figures anew.
"""

import importlib
import json
import re
import runpy
from pathlib import Path

from reslab.report.charts import Drawn
from reslab.report.svg import standalone
from reslab.run import Record
from reslab.study.lab import find
from reslab.study.lesion import MEASURES

DOCS = Path(__file__).parents[2] / "docs"
GALLERY = runpy.run_path(str(DOCS.parent / "benchmarks" / "gallery.py"))
TWINS = ("residual", "plain", "untrained")


def planned(record: Record) -> tuple[int, int]:
    """Records were kept by the names of their files; `lesion` and `estimation` tell of nets and kinds in the order of the plan."""
    return list(MEASURES).index(record["lesion"]) if "lesion" in record else 0, TWINS.index(record["twin"]) if "twin" in record else 0


def kept(folder: str) -> list[Record]:
    return sorted(map(json.loads, (DOCS / "studies" / folder / "records.jsonl").read_text("utf-8").splitlines()), key=planned)


def drawn(name: str, folder: str) -> list[Drawn]:
    figures: list[Drawn] = importlib.import_module(f"reslab.report.studies.{name}").figures(kept(folder))
    return figures[: GALLERY["FIGURES"]]


def told(name: str, folder: str) -> str:
    """What the page says of a study: its answer, claims and figures."""
    study, records = find(name), kept(folder)
    claims = [claim._asdict() for claim in study.claims(records)]
    text: str = GALLERY["told"](study.answer(records), claims, [figure.title for figure in drawn(name, folder)], folder)
    return text


def rewritten(page: str) -> str:
    """The page with every study's answer, claims and captions as its kept records have them now."""
    head, *sections = page.split("\n## ")
    for i, section in enumerate(sections):
        title, rest = section.split("\n", 1)
        folder = re.search(r"\(studies/([^/]+)/", rest)
        assert folder
        sections[i] = f"{title}\n\n{told(title.split()[0], folder[1])}" + rest[rest.index("\n```sh") :]
    return "\n## ".join([head, *sections])


def test_the_page_says_what_the_kept_records_say() -> None:
    page = (DOCS / "studies.md").read_text("utf-8")
    assert page.startswith(GALLERY["HEAD"])
    assert page == rewritten(page), "python -m tests.study.test_gallery writes it anew"


if __name__ == "__main__":
    file = DOCS / "studies.md"
    file.write_text(rewritten(file.read_text("utf-8")), "utf-8")
    for folder in sorted((DOCS / "studies").iterdir()):
        for number, figure in enumerate(drawn(folder.name.split("-")[0], folder.name), start=1):
            (folder / f"{number}.svg").write_bytes(standalone(figure.svg))
