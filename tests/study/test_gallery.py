"""docs/studies.md says what the studies say now of the records that were kept.

After a change of a claim's rule or words, or of a figure, `python -m tests.study.test_gallery` writes its answers, claims and figures anew.
"""

import importlib
import json
import re
from pathlib import Path

from reslab.report.charts import Drawn
from reslab.report.svg import standalone
from reslab.run import Record
from reslab.study.lab import find
from reslab.study.lesion import MEASURES

DOCS = Path(__file__).parents[2] / "docs"
WORDS = {"agrees": "✓ agrees", "disagrees": "✗ disagrees", "not decided at this budget": "· not decided"}


FIGURES = 2  # of each study, as `benchmarks/gallery.py` has them
TWINS = ("residual", "plain", "untrained")


def planned(record: Record) -> tuple[int, int]:
    """Records were kept by the names of their files; `lesion` and `estimation` tell of nets and kinds in the order of the plan."""
    return list(MEASURES).index(record["lesion"]) if "lesion" in record else 0, TWINS.index(record["twin"]) if "twin" in record else 0


def kept(folder: str) -> list[Record]:
    return sorted(map(json.loads, (DOCS / "studies" / folder / "records.jsonl").read_text("utf-8").splitlines()), key=planned)


def drawn(name: str, folder: str) -> list[Drawn]:
    figures: list[Drawn] = importlib.import_module(f"reslab.report.studies.{name}").figures(kept(folder))
    return figures[:FIGURES]


def told(name: str, folder: str) -> str:
    """The answer, the claims and the figures of a study, as `benchmarks/gallery.py` words them."""
    records = kept(folder)
    claims = "\n".join(f"| {c.paper} | {c.measured} | {WORDS[c.verdict]} |" for c in find(name).claims(records))
    pictures = "\n".join(f"![{f.title}](studies/{folder}/{i}.svg)\n\n*{f.title}.*\n" for i, f in enumerate(drawn(name, folder), start=1))
    return f"{find(name).answer(records)}\n\n| claim | measured here | verdict |\n|---|---|---|\n{claims}\n\n{pictures}"


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
    assert page == rewritten(page), "python -m tests.study.test_gallery writes it anew"


if __name__ == "__main__":
    file = DOCS / "studies.md"
    file.write_text(rewritten(file.read_text("utf-8")), "utf-8")
    for folder in sorted((DOCS / "studies").iterdir()):
        for number, figure in enumerate(drawn(folder.name.split("-")[0], folder.name), start=1):
            (folder / f"{number}.svg").write_bytes(standalone(figure.svg))
