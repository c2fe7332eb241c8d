"""Errors by depth of nets without norm from four starts, and their running losses."""

from reslab.report.charts import Drawn, colours
from reslab.report.grids import Line, Panel, by_depth, losses
from reslab.run import Record
from reslab.study.grid import depths
from reslab.study.init import STARTS

COLOURS = colours(list(STARTS.values()))


def figures(records: list[Record]) -> list[Drawn]:
    """Training and test error by depth, and the loss of the deepest nets."""
    deep = depths(records)[-1]
    lines = [Line(start, colour, {"start": start}) for start, colour in COLOURS.items()]
    panels = [Panel("training images", "train_error", lines), Panel("test images", "test_error", lines)]
    by_start = {start: [Line(start, colour, {"start": start, "layers": deep})] for start, colour in COLOURS.items()}
    return [
        by_depth("Error by depth without norm, from four starts, a dot a seed", records, panels),
        losses(f"Training loss by step at {deep} layers, a line a seed", records, by_start),
    ]
