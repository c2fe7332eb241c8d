"""Errors by shortcut beside those of He et al. 2016, table 1."""

from reslab.report.charts import Drawn
from reslab.report.grids import variants
from reslab.run import Record
from reslab.study.shortcuts import TABLE


def figures(records: list[Record]) -> list[Drawn]:
    """A row a shortcut, and the running loss of each beside the identity's."""
    return variants(records, list(TABLE), "shortcut")
