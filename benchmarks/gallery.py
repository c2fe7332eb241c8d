"""docs/studies.md from finished studies: for each its question, its answer, its verdicts, its first figures and its command.

    python gallery.py STUDY...        folders that `reslab study` wrote, in the order they are to be shown

Every number on that page is one that the studies printed. The figures are copied to docs/studies/, the records of each
study beside them as one file.
"""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
FIGURES = 2  # of each study
HEAD = """# Studies

`reslab study` asks questions about residual networks and answers them by measuring, on your machine and in about the
time that you state. Each answer is a page that puts what a paper says beside what was measured, with n, intervals and a verdict:
agrees, disagrees, or not decided at this budget. Below is what real runs gave; this page was written by
`python benchmarks/gallery.py` from their records, which lie in [docs/studies](studies). Claims, verdicts, figures and the lines about budgets were since
worded, decided and drawn as the studies do now, from the same records, without measuring anew; the claim of
`degradation` on cifar10 that one seed can decide was written after those records were.
"""
WORDS = {"agrees": "✓ agrees", "disagrees": "✗ disagrees", "not decided at this budget": "· not decided"}


def without_out(command: str) -> str:
    """Where the author kept it is nobody else's folder."""
    words = shlex.split(command)
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return shlex.join(words)


def told(answer: str, claims: list[dict[str, str]], titles: list[str], name: str) -> str:
    """A study's answer, its claims beside what was measured, and its first figures, which lie under that name."""
    rows = "\n".join(f"| {c['paper']} | {c['measured']} | {WORDS[c['verdict']]} |" for c in claims)
    pictures = "\n".join(f"![{title}](studies/{name}/{i}.svg)\n\n*{title}.*\n" for i, title in enumerate(titles[:FIGURES], start=1))
    return f"{answer}\n\n| claim | measured here | verdict |\n|---|---|---|\n{rows}\n\n{pictures}"


def section(folder: Path, taken: list[str]) -> str:
    facts: dict[str, Any] = json.loads((folder / "study.json").read_text("utf-8"))
    name = f"{facts['name']}-{facts['data']}"
    name += f"-{taken.count(name) + 1}" if name in taken else ""
    taken.append(name)
    kept = DOCS / "studies" / name
    kept.mkdir(parents=True, exist_ok=True)
    for number in range(1, len(facts["figures"][:FIGURES]) + 1):
        shutil.copyfile(folder / "figures" / f"{number}.svg", kept / f"{number}.svg")
    records = sorted(folder.glob("cells/*.jsonl"))
    (kept / "records.jsonl").write_text("".join(file.read_text("utf-8") for file in records), "utf-8")
    return f"""
## {facts["name"]} on {facts["data"]}: {facts["question"]}

{told(facts["answer"], facts["claims"], facts["figures"], name)}
```sh
{without_out(facts["command"])}
```

{facts["protocol"]} {facts["data"]} at {facts["size"]} px, {facts["cells"]} cells, {facts["seconds"]} s; {facts["hardware"]}.
"""


if __name__ == "__main__":
    taken: list[str] = []
    sections = [section(Path(folder), taken) for folder in sys.argv[1:]]
    (DOCS / "studies.md").write_text(HEAD + "".join(sections), "utf-8")
    print(f"docs/studies.md: {len(sections)} studies")
