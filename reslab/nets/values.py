"""What values the tensors of a net can have: a file's are looked at before they are believed.

A net that is damaged does not always say so: oneDNN's ReLU makes zeros of what is no number, and the answers look like any others.
"""

import torch
from torch import Tensor


def flaw(name: str, tensor: Tensor, own: Tensor) -> str:
    """What is wrong with a tensor that is to become a net's `own` of that name, as the end of a sentence; nothing where nothing is."""
    if tensor.is_floating_point() != own.is_floating_point() or tensor.is_complex():
        return f"has dtype {tensor.dtype}, the net needs {own.dtype}"
    if tensor.is_floating_point() and not torch.isfinite(tensor.to(own.dtype)).all():
        return "holds values that are not finite"
    if name.endswith("running_var") and (tensor < 0).any():
        return "holds variances below zero"
    return ""
