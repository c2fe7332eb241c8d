"""The config.json that timm and Hugging Face Transformers keep beside weights: written for ours, heard about theirs."""

from dataclasses import fields, replace
from typing import Any, NamedTuple

from reslab.errors import CallError, shown
from reslab.family import FAMILY, Row
from reslab.spec import BOTTLENECK_EXPANSION, STEMS, Spec

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TIMM = {  # our row: timm's architecture, where the names differ
    **{f"preact_resnet{depth}": f"resnetv2_{depth}" for depth in (50, 101, 152)},
    **{f"se_resnet{depth}": f"seresnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"se_resnext{name}": f"seresnext{name}" for name in ("50_32x4d", "26d_32x4d")},
    **{f"resnet{name}_blur": f"resnetblur{name}" for name in ("18", "50", "50d")},
    **{
        name: name
        for name in (
            *("resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200", "resnet50_gn", "resnet50c"),
            *("resnet18d", "resnet26d", "resnet34d", "resnet50d", "resnet101d", "resnet152d", "resnet200d"),
            *("wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext50d_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
            *("resnetrs50", "resnetrs101", "resnetrs152", "resnetrs200", "resnetrs270", "resnetrs350", "resnetrs420"),
        )
    },
}
ABSENT = {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False}  # what transformers takes a missing key for
SILENT = ("stride", "order", "antialias", "eps", "stem")  # fields that neither names nor shapes always tell


class Inputs(NamedTuple):
    """What images a net expects, for those who will load its weights: pixels in [0, 1], then (x - mean) / std."""

    image_size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop: float = 0.875  # the part of the image's short side that is used
    classes: tuple[str, ...] = ()


def timm_config(spec: Spec, inputs: Inputs) -> dict[str, Any]:
    """timm's config.json. Raises CallError for a net that none of its architectures is."""
    found = next((TIMM[name] for name, row in FAMILY.items() if name in TIMM and _as_published(spec, row) == row.spec), None)
    if found is None:
        raise CallError("a timm config.json names an architecture, which must be one of timm's; this net is none: save it with dialect 'ours'")
    size = [spec.in_channels, inputs.image_size, inputs.image_size]
    side = -(-inputs.image_size // spec.reduction)
    preact, deep = spec.order == "preact", len(STEMS[spec.stem].convs) > 1
    config = {
        "architecture": found,
        "num_classes": spec.num_classes,
        "num_features": _features(spec)[-1],
        "global_pool": "avg",
        "pretrained_cfg": {
            "num_classes": spec.num_classes,
            "input_size": size,
            "fixed_input_size": False,
            "pool_size": [side, side],
            "crop_pct": inputs.crop,
            "interpolation": inputs.interpolation,
            "mean": list(inputs.mean),
            "std": list(inputs.std),
            "first_conv": "stem.conv" if preact else "conv1.0" if deep else "conv1",
            "classifier": "head.fc" if preact else "fc",
        },
    }
    if spec.in_channels != 3:
        config["model_args"] = {"in_chans": spec.in_channels}
    return config | ({"label_names": list(inputs.classes)} if inputs.classes else {})


def huggingface_config(spec: Spec, inputs: Inputs) -> dict[str, Any]:
    """The config.json of `transformers.ResNetForImageClassification`."""
    labels = inputs.classes or tuple(f"LABEL_{i}" for i in range(spec.num_classes))
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "num_channels": spec.in_channels,
        "embedding_size": spec.stem_width or spec.widths[0],
        "hidden_sizes": _features(spec),
        "depths": list(spec.depths),
        "layer_type": spec.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": spec.block == "bottleneck" and spec.stride == "v1",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def contradiction(config: dict[str, Any], spec: Spec) -> str:
    """What a config.json says against the net being `spec`, of that which the shapes of weights cannot tell; or nothing."""
    if config.get("model_type") == "resnet":
        ours = huggingface_config(spec, Inputs())
        keys = ["hidden_act", "downsample_in_first_stage"] + ["downsample_in_bottleneck"] * (spec.block == "bottleneck")
        for key in keys:
            held = config.get(key, ABSENT[key])
            if held != ours[key]:
                return f"{key} is {shown(str(held))[:40]}, and in this net it is {ours[key]}: choose the net it was made with"
        plain = FAMILY["resnet50"].spec
        for field in SILENT:
            if field != "stride" and getattr(spec, field) != getattr(plain, field):
                return f"model_type is resnet, with {field} {getattr(plain, field)}, and this net has {getattr(spec, field)}: choose the net it was made with"
    elif isinstance(config.get("architecture"), str):
        architecture = config["architecture"]
        row = next((name for name, theirs in TIMM.items() if theirs == architecture), None)
        if row is None:
            return f"architecture is timm's {shown(architecture)[:60]}, which no row of the family is known to be"
        if any(getattr(FAMILY[row].spec, field) != getattr(spec, field) for field in SILENT):
            return f"architecture is timm's {architecture}, which is {row} here: choose that net"
    return ""


def _features(spec: Spec) -> list[int]:
    """Channels that each stage gives."""
    return [width * (BOTTLENECK_EXPANSION if spec.block == "bottleneck" else 1) for width in spec.widths]


def _as_published(spec: Spec, row: Row) -> Spec:
    """With the row's classes and channels, and what it has of that which only matters in training."""
    same = ("num_classes", "in_channels", "zero_init", "drop_path", "dropout")
    return replace(spec, **{f.name: getattr(row.spec, f.name) for f in fields(Spec) if f.name in same})
