"""bfloat16 products through float32: the same numbers as exact sums, rounded once."""

import pytest
import torch
from torch import nn

from dpo_ray.model import linear


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_exact_products_rounded_once(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small whole numbers: their products and sums are exact in float32, so that only the last rounding shows."""
    monkeypatch.setattr(linear, "widens", lambda dtype, _: dtype == torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator, dtype=torch.float64)

    layer = linear.widen_products(nn.Linear(40, 24, bias=bias)).to(torch.bfloat16)
    exact = nn.Linear(40, 24, bias=bias).double()
    with torch.no_grad():
        for mine, other in zip(layer.parameters(), exact.parameters(), strict=True):
            values = whole(*other.shape)
            mine.copy_(values)
            other.copy_(values)
    states, grad = whole(2, 5, 40), whole(2, 5, 24)
    mine, other = states.bfloat16().requires_grad_(), states.clone().requires_grad_()
    found, expected = layer(mine), exact(other)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == expected.bfloat16().tolist()
    found.backward(grad.bfloat16())
    expected.backward(grad)
    assert mine.grad.tolist() == other.grad.bfloat16().tolist()
    for parameter, wanted in zip(layer.parameters(), exact.parameters(), strict=True):
        assert parameter.grad.tolist() == wanted.grad.bfloat16().tolist()


def test_float32_is_left_alone() -> None:
    layer = linear.widen_products(nn.Linear(4, 3))
    assert layer(torch.ones(2, 4)).grad_fn.name() == "AddmmBackward0"
