"""The heat map that the page shows: Grad-CAM (Selvaraju et al. 2017, 1610.02391) of the last stage."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reslab.data.decode import Pixels


def has_heat_map(classifier: Any) -> bool:
    """Whether the classifier holds a net with gradients; one read from an ONNX file does not."""
    return hasattr(classifier, "net")


def heat_map(classifier: Any, pixels: Pixels) -> NDArray[np.float32]:
    """uint8 (canvas, canvas, C) -> float32 (image_size, image_size) in [0, 1]: where the likeliest class was seen."""
    import torch
    import torch.nn.functional as F

    net = classifier.net
    x = classifier.preprocess(torch.from_numpy(pixels.copy())[None], next(net.parameters()).device)
    outputs: dict[str, torch.Tensor] = {}
    with torch.enable_grad():
        logits = net(x.requires_grad_(), outputs)
        last = outputs[list(outputs)[-1]]
        (gradient,) = torch.autograd.grad(logits.max(), last)
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * last.detach()).sum(1, keepdim=True))
    cam = F.interpolate(cam / cam.max().clamp_min(1e-12), x.shape[2:], mode="bilinear", align_corners=False)[0, 0]
    found: NDArray[np.float32] = cam.cpu().numpy()
    return found
