"""The curves for TensorBoard, written as they come. Needs the extra `tensorboard`."""

from pathlib import Path
from typing import Any

from reslab.errors import needs_extra


class Board:
    """Scalars of a training in `folder`. Raises WorkError when the extra is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise needs_extra("tensorboard", "tensorboard") from error
        self.writer: Any = SummaryWriter(str(folder))

    def write(self, part: str, step: int, facts: dict[str, float]) -> None:
        """One point on each curve."""
        for name, value in facts.items():
            self.writer.add_scalar(f"{part}/{name}", value, step)
        self.writer.flush()
