"""A product over all pixels, and what it does at once, is what it would be step by step."""

import pytest
import torch

from reslab.nets.product import product, usable
from tests.conftest import distance

by_tiles = pytest.mark.skipif(not usable(), reason="no matrix tiles (AMX) here, or no C compiler")


@by_tiles
@pytest.mark.parametrize(("n", "inputs", "seconds", "outputs", "size"), [(1, 32, 32, 32, 6), (3, 96, 64, 128, 11), (9, 64, 160, 96, 22), (2, 32, 64, 3072, 32)])
@pytest.mark.parametrize("back", [False, True])
def test_a_product_is_rounded_once(n: int, inputs: int, seconds: int, outputs: int, size: int, back: bool) -> None:
    """Also where pixels do not fill tiles, and where what comes out is too large for the caches."""
    torch.manual_seed(5)
    x, more, added, gate = (torch.randn(n, c, size, size).bfloat16().contiguous(memory_format=torch.channels_last) for c in (inputs, seconds, outputs, outputs))
    filters, others, shift = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs, seconds).bfloat16(), torch.randn(outputs)
    laid = [w.T.contiguous() if back else w for w in (filters, others)]
    plain = torch.einsum("nihw,oi->nohw", x.double(), filters.double())
    assert distance(product(x, laid[0], back=back)[0], plain) < 0.002
    whole = plain + torch.einsum("nihw,oi->nohw", more.double(), others.double()) + added.double() + shift.double()[:, None, None]
    for rectify, door, right in ((True, None, whole.relu()), (False, gate, whole * (gate > 0))):
        found, total = product(x, laid[0], back=back, second=(more, laid[1]), shift=shift, added=added, rectify=rectify, gate=door)
        assert distance(found, right) < 0.002 and distance(total, right.sum((0, 2, 3))) < 1e-6
        assert found.is_contiguous(memory_format=torch.channels_last)
    other = gate.clone()
    other[-1, -1, -1, -1] *= -1
    assert (product(x, laid[0], back=back, gate=gate)[0] != product(x, laid[0], back=back, gate=other)[0]).sum() == 1, "the last pixel is noticed"
