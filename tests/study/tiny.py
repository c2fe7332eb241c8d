"""A small net with nothing at its default, and all that a study could leave changed of a net."""

import torch
from torch import nn

import reslab
from reslab.nets.torch import ResNet


def tiny(seed: int = 0, **changes: object) -> ResNet:
    """Seven blocks with random weights, scales and statistics."""
    torch.manual_seed(seed)
    net = reslab.build("resnet20", **{"depths": (3, 2, 2), "widths": (8, 16, 32), "in_channels": 1, **changes})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.3)
    return net.eval()


def everything(net: nn.Module) -> tuple[object, ...]:
    """All that a study could leave changed."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()]
    grads = [(p.requires_grad, p.grad is None) for p in net.parameters()]
    state = {key: tensor.tolist() for key, tensor in net.state_dict().items()}
    return state, [id(m) for m in net.modules()], [m.training for m in net.modules()], hooks, grads, torch.get_rng_state().tolist()
