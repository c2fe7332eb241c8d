"""One network as a sheet: layer by layer its output, its cost and its receptive field, and the memory it needs.

Equal blocks in a row are told once, with the names of the first; `3 x 2,304` is what each of three holds. Standard library only.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from reslab.catalogue.memory import Memory, memory
from reslab.catalogue.table import table
from reslab.errors import CallError, WorkError, shown, unknown
from reslab.family import FAMILY
from reslab.layout import Layer, Part, parts
from reslab.receptive import receptive_field
from reslab.spec import Spec

BAR = 16  # characters
HEADINGS = ("layer", "kind", "output", "parameters", "multiply-adds", "share", "", "sees")
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


class Subject(NamedTuple):
    """A network to tell about: its name, what it is, for which images, and where it is from."""

    name: str
    spec: Spec
    image_size: int
    source: str


def find(name: str, image_size: int | None = None) -> Subject:
    """A name in `FAMILY`, a run folder or its `model/`. `image_size` replaces the published or trained one.

    Raises CallError for what is neither, and for a size that the net does not take; WorkError for a damaged model.
    """
    folder = Path(name)
    if name in FAMILY:
        found = Subject(name, FAMILY[name].spec, FAMILY[name].image_size, FAMILY[name].source)
    elif folder.is_dir():
        found = _trained(folder)
    else:
        raise unknown("net", shown(name), FAMILY, "; `reslab models` lists them, and the folder of a run will do too")
    size = found.image_size if image_size is None else image_size
    if not 1 <= size <= 4096:
        raise CallError(f"--image-size must be from 1 to 4096; received {size}")
    found.spec.check_size(size)
    return found._replace(image_size=size)


def _trained(folder: Path) -> Subject:
    model = folder / "model" if (folder / "model").is_dir() else folder
    if not (model / "spec.json").is_file():
        raise CallError(f"show takes a net's name or the folder of a finished run; {shown(folder)} has no model/spec.json: `reslab models` lists the names")
    try:
        spec = Spec.from_dict(json.loads((model / "spec.json").read_text("utf-8")))
        size = json.loads((model / "preprocess.json").read_text("utf-8"))["image_size"]
        if type(size) is not int:
            raise ValueError(f"image_size {size!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WorkError(f"the model in {shown(model)} is damaged: {shown(str(error))[:200]}") from error
    whole = model.resolve()
    return Subject(shown(whole.parent.name if whole.name == "model" else whole.name), spec, size, "trained here")


def sheet(subject: Subject, batch: int, whole: bool, width: int | None) -> list[str]:
    """The lines of the sheet, no wider than `width`; `whole` tells every block."""
    name, spec, size, source = subject
    cost, sees = spec.cost(size), receptive_field(list(spec.layers(size)))
    made = parts(spec, size, fold=not whole)
    most = max(sum(layer.macs for layer in part.layers) * part.times for part in made)
    rows = [row for part in made for row in _part_rows(part, cost.macs, most, sees)]
    return [
        f"{name} at {size} px: {source}",
        "",
        *table(HEADINGS, rows, numbers=HEADINGS[2:6], width=width),
        "",
        f"{cost.params:,} parameters, {cost.macs:,} multiply-adds and {cost.activations:,} bytes of layer outputs an image in fp32",
        *_memory_lines(memory(spec, size, batch), batch),
    ]


def _part_rows(part: Part, macs: int, most: int, sees: dict[str, int]) -> list[tuple[str, ...]]:
    """A row for the blocks together, and one for each layer of them; stem and head have the layers only."""

    def costs(layers: list[Layer]) -> tuple[str, ...]:
        params, own = sum(layer.params for layer in layers), sum(layer.macs for layer in layers)
        total = own * part.times
        bar = "█" * round(BAR * total / most) or "▏" * bool(total)
        return _many(part.times, params), _many(part.times, own), f"{total / macs:.1%}" if total else "", bar

    def field(layer: Layer) -> str:
        names = [layer.name] if not part.blocks else [part.blocks[i] + layer.name.removeprefix(part.blocks[0]) for i in (0, -1)]
        seen = sorted({sees[name] for name in names if name in sees})
        return " … ".join(f"{n:,}" for n in seen) + " px" * bool(seen)

    rows = []
    if part.blocks:
        first, last, final = part.blocks[0], part.blocks[-1], part.layers[-1]
        title = (first, "block") if part.times == 1 else (f"{first} … {last}", f"{part.times} equal blocks")
        rows.append((*title, _shape(final), *costs(part.layers), ""))
    for layer in part.layers:
        rows.append(("  " * bool(part.blocks) + layer.name, _kind(layer), _shape(layer), *costs([layer]), field(layer)))
    return rows


def _many(times: int, n: int) -> str:
    return "" if not n else f"{n:,}" if times == 1 else f"{times} x {n:,}"


def _shape(layer: Layer) -> str:
    return " x ".join(map(str, layer.shape))


def _kind(layer: Layer) -> str:
    window = layer.conv or layer.pool
    if window is None or layer.kind == "pad":
        return layer.kind
    groups = f", {layer.conv.groups} groups" if layer.conv and layer.conv.groups > 1 else ""
    return f"{layer.kind} {window.kernel}x{window.kernel}" + (f" /{window.stride}" if window.stride > 1 else "") + groups


def _memory_lines(m: Memory, batch: int) -> list[str]:
    parts = (("parameters", m.parameters), ("gradients", m.gradients), ("momentum", m.momentum), ("kept for the backward pass", m.kept))
    told = " + ".join(f"{_bytes(n)} {what}" for what, n in parts)
    return [
        f"memory in fp32 for a batch of {batch}, at least (the workspace of convolutions comes on top):",
        f"  a training step  {_bytes(m.training)} = {told}",
        f"  inference        {_bytes(m.inference)}",
    ]


def _bytes(n: int) -> str:
    power = min(len(UNITS) - 1, max(0, n.bit_length() - 1) // 10)
    return f"{n / 1024**power:.3g} {UNITS[power]}" if n < 1000 * 1024**power else f"{n / 1024**power:.0f} {UNITS[power]}"


def to_dict(subject: Subject, batch: int) -> dict[str, Any]:
    """All of it for JSON: every layer, sizes in bytes, `receptive_field` in pixels or None where all is seen."""
    name, spec, size, source = subject
    layers = list(spec.layers(size))
    sees = receptive_field(layers)
    held = memory(spec, size, batch)
    return {
        "name": name,
        "source": source,
        "image_size": size,
        "spec": asdict(spec),
        "cost": spec.cost(size)._asdict(),
        "memory": {"batch": batch, **held._asdict(), "training": held.training},
        "layers": [_layer_dict(layer) | {"receptive_field": sees.get(layer.name)} for layer in layers],
    }


def _layer_dict(layer: Layer) -> dict[str, Any]:
    window = layer.conv or layer.pool
    made = {"name": layer.name, "kind": layer.kind, "inputs": layer.inputs, "shape": layer.shape, "params": layer.params, "macs": layer.macs}
    if window is not None:
        made |= {"kernel": window.kernel, "stride": window.stride}
    return made | ({"groups": layer.conv.groups} if layer.conv else {})
