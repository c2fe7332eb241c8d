"""docs/studies.md says what the studies say now of the records that were kept.

After a change of a claim's rule or words, `python -m tests.study.test_gallery` writes its answers and claims anew.
"""

import json
import re
from pathlib import Path

from reslab.run import Record
from reslab.study.lab import find
from reslab.study.lesion import MEASURES

DOCS = Path(__file__).parents[2] / "docs"
WORDS = {"agrees": "✓ agrees", "disagrees": "✗ disagrees", "not decided at this budget": "· not decided"}


def planned(record: Record) -> tuple[int, bool]:
    """Records were kept by the names of their files; `lesion` tells of nets and kinds in the order of the plan."""
    return (list(MEASURES).index(record["lesion"]), record["twin"] == "plain") if "lesion" in record else (0, False)


def told(name: str, folder: str) -> str:
    """The answer and the claims of a study, as `benchmarks/gallery.py` words them."""
    lines = (DOCS / "studies" / folder / "records.jsonl").read_text("utf-8").splitlines()
    records = sorted(map(json.loads, lines), key=planned)
    claims = "\n".join(f"| {c.paper} | {c.measured} | {WORDS[c.verdict]} |" for c in find(name).claims(records))
    return f"{find(name).answer(records)}\n\n| claim | measured here | verdict |\n|---|---|---|\n{claims}\n"


def rewritten(page: str) -> str:
    """The page with every study's answer and claims as its kept records have them now."""
    head, *sections = page.split("\n## ")
    for i, section in enumerate(sections):
        title, rest = section.split("\n", 1)
        folder = re.search(r"\(studies/([^/]+)/", rest)
        assert folder
        sections[i] = f"{title}\n\n{told(title.split()[0], folder[1])}" + rest[rest.index("\n![") :]
    return "\n## ".join([head, *sections])


def test_the_page_says_what_the_kept_records_say() -> None:
    page = (DOCS / "studies.md").read_text("utf-8")
    assert page == rewritten(page), "python -m tests.study.test_gallery writes it anew"


if __name__ == "__main__":
    file = DOCS / "studies.md"
    file.write_text(rewritten(file.read_text("utf-8")), "utf-8")
