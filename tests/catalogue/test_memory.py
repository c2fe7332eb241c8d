import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import reslab
from reslab.catalogue.memory import memory
from reslab.spec import Spec


def saved_by_autograd(spec: Spec, size: int, batch: int) -> int:
    """Bytes that a forward pass keeps for the backward one, parameters and buffers left out."""
    net = reslab.build(spec).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(torch.randn(batch, spec.in_channels, size, size))
    assert out.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize(
    ("name", "size", "batch"),
    [
        ("resnet20", 32, 4), ("resnet50", 64, 3), ("resnet50", 97, 2), ("plain20", 32, 2), ("preact164", 16, 2), ("resnet110_exclusive_gate", 16, 2),
        ("resnet110_shortcut_gate", 16, 2), ("resnet110_scaling", 16, 2), ("resnet110_dropout_shortcut", 16, 2), ("resnet110_stochastic", 16, 2),
        ("resnet110_bn_after_add", 16, 2), ("resnet110_relu_before_add", 16, 2), ("resnet110_relu_preact", 16, 2), ("resnet110_fixup", 16, 2),
        ("resnet110_skipinit", 16, 2), ("resnet110_rezero", 16, 2), ("se_resnet50", 64, 2), ("resnet50_blur", 64, 2), ("resnet50d", 64, 2),
        ("resnet50_gn", 64, 2), ("resnetrs50", 64, 2), ("skipblock8", 32, 2), ("keras_resnet50v2", 64, 2), ("keras_teaching_resnet50", 64, 2),
    ],
)  # fmt: skip
def test_what_is_kept_is_what_autograd_saves_byte_for_byte(name: str, size: int, batch: int) -> None:
    spec = reslab.spec(name)
    assert memory(spec, size, batch).kept == saved_by_autograd(spec, size, batch)


def test_a_training_step_is_the_sum_of_its_parts() -> None:
    held = memory(reslab.spec("resnet20"), 32, 128)
    assert held.parameters == held.gradients == held.momentum == 4 * 269_722
    assert held.training == 3 * held.parameters + held.kept


def test_inference_is_what_torch_allocates_at_least_and_less_than_twice() -> None:
    """The rest is the workspace of convolutions and a tensor that a local variable keeps a little longer."""
    net, x = reslab.build("resnet50").eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        net(x)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    held = memory(net.spec, 224, 2)
    estimate = held.inference - held.parameters
    assert estimate <= most + x.nbytes < 2 * estimate
