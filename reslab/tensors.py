"""Named tensors on disk: one safetensors file, written whole, with a line of text beside the tensors."""

from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from reslab.errors import WorkError, shown
from reslab.run import write_whole


def write_tensors(path: Path, tensors: dict[str, Tensor], header: str = "") -> None:
    """Replaces the file. Raises WorkError when it cannot be written; what was there is kept."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(plain, {"format": "pt", "reslab": header}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """What `write_tensors` wrote: the tensors and the text. Raises WorkError."""
    try:
        with safetensors.safe_open(path, "pt") as held:
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
            return tensors, (held.metadata() or {}).get("reslab", "")
    except (OSError, safetensors.SafetensorError) as error:
        raise WorkError(f"{shown(path)} cannot be read as weights: {shown(str(error))[:120]}") from error


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
