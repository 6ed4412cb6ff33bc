"""bfloat16 matrix products on CPUs without instructions for them.

There PyTorch multiplies bfloat16 several times slower than float32. The same products, with operands and results in
bfloat16 and sums in float32, as hardware with such instructions computes them, go through float32 instead.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this dtype are better computed in float32 on this device."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widen_products(model: nn.Module) -> nn.Module:
    """Makes the linear layers of a model multiply in float32 where that is faster; elsewhere they stay as they are."""
    if not widens(torch.bfloat16, torch.device("cpu")):
        return model  # A layer that asks each time is one that torch.compile cannot see through.
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
    return model


def _forward(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    if widens(states.dtype, states.device):
        return _WideLinear.apply(states, layer.weight, layer.bias)
    return F.linear(states, layer.weight, layer.bias)


class _WideLinear(torch.autograd.Function):
    """`F.linear` with operands and results in bfloat16 and everything between in float32."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        wide = F.linear(states.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(states.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        states, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        wide, dtype = grad.float(), grad.dtype
        rows = wide.flatten(0, -2)
        return (
            (wide @ weight.float()).to(dtype) if wanted[0] else None,
            (rows.T @ states.float().flatten(0, -2)).to(dtype) if wanted[1] else None,
            rows.sum(0).to(dtype) if wanted[2] else None,
        )
