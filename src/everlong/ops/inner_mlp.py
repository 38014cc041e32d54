"""The memory network: a small MLP whose weights are the memory, with its analytic gradients.

    M(x) = x + scale * LN(phi(... phi(x W_1) ...) W_L)      phi = GELU     (`scale` given)
    M(x) = phi(... phi(x W_1) ...) W_L                                      (`scale` None)

Weights are [B, H, in, out], one per layer; rows are [B, H, N, K]; `scale` is [H, K]. LN has no
bias and its scale is an outer parameter. The inner loss is |M(k) - v|^2, and each layer's gradient
is a rank-1 product per token, u = z^T delta, of the layer's input z and its error signal delta.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5  # bounds the error signal where the network's output vanishes


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of the exact GELU: Phi(x) + x phi(x)."""
    density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density


def gelu_curvature(x: Tensor) -> Tensor:
    """The second derivative of the exact GELU: phi(x) (2 - x^2)."""
    square = x * x
    return torch.exp(-0.5 * square).mul_(2 - square).mul_(1 / math.sqrt(2 * math.pi))


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm without scale: the normed rows [..., K] and 1 / sqrt(var + eps) [..., 1]."""
    centred = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + NORM_EPS)
    return centred * inverse, inverse


def memory_output(x: Tensor, last: Tensor, scale: Tensor | None) -> Tensor:
    """M(x) from its input and the last layer's product, [B, H, N, K] each."""
    if scale is None:
        return last
    return x + scale.unsqueeze(-2) * normalise(last)[0]


def apply_memory(x: Tensor, weights: Sequence[Tensor], scale: Tensor | None) -> Tensor:
    """M(x) for rows x [B, H, N, K]."""
    hidden = x
    for index, weight in enumerate(weights):
        hidden = hidden @ weight if index == 0 else F.gelu(hidden) @ weight
    return memory_output(x, hidden, scale)


def error_signals(
    k: Tensor, v: Tensor, weights: Sequence[Tensor], scale: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The factors of the inner gradient of |M(k) - v|^2, without autograd.

    k, v: [B, H, N, K]. Returns per layer the inputs z_l [B, H, N, in] and the error signals
    delta_l [B, H, N, out], so that row n's gradient of layer l is z_l[n]^T delta_l[n].
    """
    inputs, preactivations = [k], []
    for index, weight in enumerate(weights):
        preactivations.append(inputs[-1] @ weight)
        if index + 1 < len(weights):
            inputs.append(F.gelu(preactivations[-1]))
    if scale is None:
        error = 2 * (preactivations[-1] - v)
    else:
        normed, inverse = normalise(preactivations[-1])
        scale = scale.unsqueeze(-2)
        slope = scale * (2 * (k + scale * normed - v))
        centred = slope - slope.mean(-1, keepdim=True)
        error = inverse * (centred - normed * (slope * normed).mean(-1, keepdim=True))
    errors = [error]
    for weight, hidden in zip(reversed(weights[1:]), reversed(preactivations[:-1]), strict=True):
        errors.append(errors[-1] @ weight.mT * gelu_slope(hidden))
    return inputs, errors[::-1]
