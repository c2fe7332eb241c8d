"""Weights out of a net: safetensors under the names of others, with what they need to build the net again."""

import json
from pathlib import Path

from reslab.errors import CallError, shown
from reslab.nets.configs import Inputs, huggingface_config, timm_config
from reslab.nets.dialects import for_saving, from_ours
from reslab.nets.torch import ResNet
from reslab.run import write_whole
from reslab.tensors import write_tensors

CONFIGS = {"timm": timm_config, "huggingface": huggingface_config}


def save_weights(net: ResNet, path: str | Path, dialect: str = "ours", inputs: Inputs | None = None) -> Path:
    """Writes the weights as safetensors under a dialect's names; what comes back is the file that `load_weights` takes.

    "ours", "torchvision" and "akamaster" are one .safetensors file, `path`. "timm" and "huggingface" make `path` a
    folder with model.safetensors and config.json, which `timm.create_model("local-dir:PATH", pretrained=True)` and
    `transformers.ResNetForImageClassification.from_pretrained(PATH)` load. `inputs` says what images the net was trained
    on, and their classes; by default those of ImageNet.

    Raises CallError when the dialect cannot say what the net is, with what stands in the way, and WorkError when the
    files cannot be written; what was there is kept.
    """
    if not isinstance(net, ResNet):
        raise CallError(f"save_weights takes a net that reslab built; received a {type(net).__name__}: load its state into one first")
    spec, path = net.spec, Path(path)
    names = for_saving(dialect, spec)
    config = None
    if dialect in CONFIGS:
        config = CONFIGS[dialect](spec, _checked(inputs or Inputs(), net))
        if path.exists() and not path.is_dir():
            raise CallError(f"{dialect} weights are a folder; {shown(path)} is a file: give a folder's name")
        path = path / "model.safetensors"
    elif path.suffix != ".safetensors" or path.is_dir():
        raise CallError(f"{dialect} weights are one .safetensors file; received {shown(path)}: give a name that ends so")
    write_tensors(path, from_ours(names, net.state_dict()))
    if config is not None:
        write_whole(path.with_name("config.json"), json.dumps(config, indent=1).encode())
    return path


def _checked(inputs: Inputs, net: ResNet) -> Inputs:
    spec = net.spec
    if not len(inputs.mean) == len(inputs.std) == spec.in_channels:
        raise CallError(f"inputs need one mean and std for each of {spec.in_channels} channels; received {inputs.mean} and {inputs.std}: give inputs")
    if inputs.classes and not len(inputs.classes) == len(set(inputs.classes)) == spec.num_classes:
        raise CallError(f"inputs need one name for each of {spec.num_classes} classes, or none; received {len(set(inputs.classes))} different ones")
    spec.check_size(inputs.image_size)
    return inputs
