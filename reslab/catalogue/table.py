"""A table as aligned lines of text: quick to make, easy to pipe. Loading rich takes longer than counting every net."""

from collections.abc import Sequence

GAP = "  "


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = (), width: int | None = None) -> list[str]:
    """Lines of columns as wide as they need; those named in `numbers` end flush. Lines longer than `width` are cut with an ellipsis."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    flush = [heading in numbers for heading in headings]

    def line(cells: Sequence[str]) -> str:
        whole = GAP.join(c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, flush, strict=True)).rstrip()
        return whole if width is None or len(whole) <= width else whole[: width - 1] + "…"

    return [line(headings), line(["─" * w for w in widths]), *map(line, rows)]
