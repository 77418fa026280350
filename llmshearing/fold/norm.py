"""Norms that count open units. RMSNorm is written forward and backward: few passes over the tokens, one tensor kept.

    s = (sum_j x_j^2 / size + eps)^(-1/2)     n = x s     out = n w                            (Zhang, Sennrich 2019)
    dw = sum over tokens of g n               dx = s (g w - n sum_j(g_j w_j n_j) / size)        g: gradient of out

``size`` is d, less the units that are closed and only there to round d up: these are 0 in x. Left to autograd, the same
costs twice the passes and keeps three tensors of the size of x. Shapes: x [..., d]; w [d].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype, size: int
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        ctx.size = max(1, size)  # all units may be closed
        scale = square.div_(ctx.size).add_(epsilon).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = (x * scale).flatten(0, -2)
        gradient = gradient.to(normed.dtype).flatten(0, -2)
        product = gradient * normed
        d_weight = product.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = product.mv(weight.to(normed.dtype)).div_(ctx.size)
        d_x = torch.mul(gradient, weight, out=product).sub_(normed.mul_(mean[:, None])).mul_(scale.view(-1, 1))
        return d_x.view(x.shape).to(x.dtype), d_weight, None, None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype, size: int) -> Tensor:
    """RMSNorm over ``size`` units in the last dimension, computed in float32 or wider; the result is in ``dtype``."""
    return _RMSNorm.apply(x, weight, epsilon, dtype, size)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype, size: int
) -> Tensor:
    """LayerNorm over ``size`` units in the last dimension, in float32 or wider; the result is in ``dtype``.

        m = sum_j x_j / size     v = sum_j x_j^2 / size - m^2     out = (x - m) (v + eps)^(-1/2) w + b    (Ba et al.)

    Units that are closed and only there to round their number up are 0 in x, and in w and b: neither sum sees them.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if size == x.shape[-1] and size > 0:
        return torch.nn.functional.layer_norm(wide, (size,), weight.to(wide), _to(bias, wide), epsilon).to(dtype)
    size = max(1, size)  # all units may be closed
    mean = wide.sum(-1, keepdim=True) / size
    # The mean of the counted units' squared distances. Those of the others are mean^2 each.
    extra = (x.shape[-1] - size) * mean.square()
    variance = ((wide - mean).square().sum(-1, keepdim=True) - extra) / size
    out = (wide - mean) * (variance + epsilon).rsqrt() * weight
    return (out if bias is None else out + bias).to(dtype)


def _to(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.to(like)
