"""Errors by order of a block's parts beside those of He et al. 2016, table 2."""

from reslab.report.charts import Drawn
from reslab.report.grids import variants
from reslab.run import Record
from reslab.study.orderings import TABLE


def figures(records: list[Record]) -> list[Drawn]:
    """A row an order, and the running loss of each beside the original's."""
    return variants(records, list(TABLE), "order")
