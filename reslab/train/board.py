"""The curves for TensorBoard, written as they come. Needs the extra `tensorboard`."""

from pathlib import Path
from typing import Any

from reslab.errors import needs_extra


def require_tensorboard() -> Any:
    """TensorBoard's writer. Raises WorkError when the extra is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise needs_extra("tensorboard", "tensorboard") from error
    return SummaryWriter


class Board:
    """Scalars of a training in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.writer: Any = require_tensorboard()(str(folder))

    def write(self, part: str, step: int, facts: dict[str, float]) -> None:
        """One point on each curve."""
        for name, value in facts.items():
            self.writer.add_scalar(f"{part}/{name}", value, step)
        self.writer.flush()
