"""The whole way from raw images to probabilities as one torch module: what every export writes down.

Images of any size go in where the format keeps sizes open: the middle square is taken and resized with an antialiased
bilinear filter, as decoding does, but not rounded to 8 bits between the two.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from reslab.use.artefact import TorchModel
from reslab.use.classifier import Classifier


class Pipeline(nn.Module):
    """uint8 (N, H, W, C) -> calibrated probabilities and logits, both float32 (N, classes).

    With `any_size` H and W are free, otherwise both are the canvas.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier, any_size: bool = True) -> None:
        super().__init__()
        model = classifier.model
        assert isinstance(model, TorchModel)
        self.net = copy.deepcopy(model.net).to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.frame, self.any_size, self.temperature = model.preprocess, any_size, classifier.temperature
        mean, std = torch.as_tensor(model.preprocess.mean), torch.as_tensor(model.preprocess.std)
        self.register_buffer("mean", mean.view(-1, 1, 1) if mean.ndim == 1 else mean)
        self.register_buffer("std", std.view(-1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        size, canvas = self.frame.image_size, self.frame.canvas
        x = _middle_square(images) if self.any_size else images
        x = x.permute(0, 3, 1, 2).float().contiguous()  # channels-last would make the pooling a stride trick in the graph
        if self.any_size:
            x = interpolate(x, (canvas, canvas), mode="bilinear", align_corners=False, antialias=True)
        x = self.frame.crop(x) if canvas > size else x
        logits = self.frame.answer(self.net(self.frame.views((x / 255 - self.mean) / self.std)))
        return (logits / self.temperature).softmax(1), logits


def trace(pipeline: Pipeline) -> torch.export.ExportedProgram:
    """The pipeline as a graph in which the batch size, and with `any_size` height and width, stay free."""
    frame, free = pipeline.frame, pipeline.any_size
    # Neither one image nor a square one: 1 and equality are special cases that tracing would take for the rule
    example = torch.zeros(2, frame.canvas + 8 * free, frame.canvas + 16 * free, frame.channels, dtype=torch.uint8)
    names = ("batch", "height", "width") if free else ("batch",)
    sizes = {position: torch.export.Dim(name, min=1) for position, name in enumerate(names)}
    return torch.export.export(pipeline, (example,), dynamic_shapes=(sizes,))


def _middle_square(images: Tensor) -> Tensor:
    """A copy: of a view, torch.export would assume strides that images of other sizes do not have."""
    height, width = images.shape[1:3]
    side = torch.sym_min(height, width)  # type: ignore[no-untyped-call]
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side].clone(memory_format=torch.contiguous_format)
