"""The two ways a request can fail, and how untrusted text is shown in a line of terminal output.

Every message gives the rule, what was received and the fix, on one line. `assert` is kept for bugs of our own.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class CallError(ValueError):
    """The request itself is wrong: an unknown name, an option that cannot hold. Exit status 2."""


class WorkError(RuntimeError):
    """The request is fine but the work failed: unreadable data, a full disk, a diverged loss. Exit status 1."""


def unknown(what: str, received: object, known: Iterable[str], hint: str = "") -> CallError:
    """A CallError for a name that is not in `known`, with the nearest known name as the suggested fix."""
    names = list(known)
    near = difflib.get_close_matches(str(received), names, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return CallError(f"unknown {what} {str(received)!r}: {fix}{hint}")


def shown(text: str | Path) -> str:
    """`text` on one line, control characters and lone surrogates escaped, fit for a terminal or a log."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def needs_extra(module: str, extra: str) -> WorkError:
    """A WorkError that names the optional extra which brings `module`."""
    return WorkError(f"this needs {module}, which is not installed: pip install 'reslab[{extra}]'")
