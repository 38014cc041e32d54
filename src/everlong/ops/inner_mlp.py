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


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """grad times the derivative of the exact GELU at x, in one pass."""
    return torch.ops.aten.gelu_backward(grad, x)


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of the exact GELU."""
    return gelu_backward(x.new_ones(()).expand_as(x), x)


def add_gelu_curvature_(out: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """out += grad times the second derivative of the exact GELU, phi(x) (2 - x^2); uses up `grad`."""
    square = x * x
    density = (square * -0.5).exp_()
    return out.addcmul_(grad.mul_(density), square.sub_(2), value=-1 / math.sqrt(2 * math.pi))


class LayerNorm:
    """LayerNorm without scale of rows [..., K], and the way back through it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        shape = x.shape[-1:]
        self.normed, self.mean, self.inverse = torch.native_layer_norm(x, shape, None, None, NORM_EPS)

    def backward(self, grad: Tensor) -> Tensor:
        """grad times the Jacobian, which is symmetric: it serves the inner gradient as well."""
        return torch.ops.aten.native_layer_norm_backward(
            grad,
            self.x,
            self.x.shape[-1:],
            self.mean,
            self.inverse,
            None,
            None,
            [True, False, False],
        )[0]


def memory_output(x: Tensor, last: Tensor, scale: Tensor | None) -> Tensor:
    """M(x) from its input and the last layer's product, [..., N, K] each; scale [..., 1, K]."""
    return last if scale is None else torch.addcmul(x, scale, LayerNorm(last).normed)


def apply_memory(x: Tensor, weights: Sequence[Tensor], scale: Tensor | None) -> Tensor:
    """M(x) for rows x [B, H, N, K]; scale [H, K]."""
    hidden = x
    for index, weight in enumerate(weights):
        hidden = hidden @ weight if index == 0 else F.gelu(hidden) @ weight
    return memory_output(x, hidden, None if scale is None else scale.unsqueeze(-2))


class InnerGradient:
    """The factors of the inner gradient of |M(k) - v|^2, and the way back through them.

    One memory for each index of the first dimension, B H = M of them. k, v: [M, N, K]; scale:
    [M, 1, K]. `inputs` are the layers' inputs z_l [M, N, in] and `errors` the error signals delta_l
    [M, N, out]: row n's gradient of layer l is z_l[n]^T delta_l[n]. Autograd passes through;
    `backward` does without it.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        weights: Sequence[Tensor],
        scale: Tensor | None,
    ) -> None:
        self.weights, self.scale = weights, scale
        self.inputs: list[Tensor] = []
        self.hidden: list[Tensor] = []
        for layer, weight in enumerate(weights):
            self.inputs.append(F.gelu(self.hidden[layer - 1]) if layer else k)
            self.hidden.append(torch.bmm(self.inputs[-1], weight))
        if scale is None:
            error = 2 * (self.hidden[-1] - v)
        else:
            self.norm = LayerNorm(self.hidden[-1])
            self.double_scale = 2 * scale
            self.residual = torch.addcmul(k - v, scale, self.norm.normed)
            self.slope = self.residual * self.double_scale
            error = self.norm.backward(self.slope)
        self.errors = [error]
        self.pulled: list[Tensor] = []  # delta_{l+1} W_{l+1}^T, before the slope of GELU
        self.slopes = [gelu_slope(h) for h in self.hidden[:-1]]
        for weight, slope in zip(reversed(weights[1:]), reversed(self.slopes), strict=True):
            self.pulled.append(torch.bmm(self.errors[-1], weight.mT))
            self.errors.append(self.pulled[-1] * slope)
        self.errors.reverse()
        self.pulled.reverse()

    def backward(
        self, dinputs: Sequence[Tensor], derrors: Sequence[Tensor], dweights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """From the gradients of `inputs` and `errors`, which are used up, to those of k, v, scale.

        Adds to `dweights`.
        """
        dhidden: list[Tensor] = []
        for layer, weight in enumerate(self.weights[1:]):
            derror = derrors[layer]
            dpulled = derror * self.slopes[layer]
            dhidden.append(derror.mul_(self.pulled[layer]))
            derrors[layer + 1].baddbmm_(dpulled, weight)
            dweights[layer + 1].baddbmm_(dpulled.mT, self.errors[layer + 1])
        dlast, dresidual, dscale = self._backward_of_last(derrors[-1])
        dhidden.append(dlast)
        for layer in reversed(range(len(self.weights))):
            dweights[layer].baddbmm_(self.inputs[layer].mT, dhidden[layer])
            dinput = dinputs[layer].baddbmm_(dhidden[layer], self.weights[layer].mT)
            if layer:
                below = layer - 1
                through = dinput.mul_(self.slopes[below])
                dhidden[below] = add_gelu_curvature_(through, dhidden[below], self.hidden[below])
        if self.scale is None:
            return dinput, dresidual.neg_(), None
        return dinput.add_(dresidual), dresidual.neg_(), dscale

    def _backward_of_last(self, derror: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Through the last error signal: gradients of the last product, of the residual, of scale."""
        if self.scale is None:
            return 2 * derror, 2 * derror, None
        norm, slope = self.norm, self.slope
        along = (slope * norm.normed).sum(-1, keepdim=True)
        dnormed = slope * (derror * norm.normed).sum(-1, keepdim=True)
        dnormed.addcmul_(derror, along).mul_(norm.inverse * (-1 / derror.shape[-1]))
        # Through 1 / sqrt(var + eps) of the error signal, which is proportional to it.
        shrink = (derror * self.errors[-1]).sum(-1, keepdim=True).mul_(norm.inverse)
        dslope = norm.backward(derror)
        dresidual = dslope * self.double_scale
        dnormed.addcmul_(dresidual, self.scale)
        dscale = dslope.mul_(self.residual).mul_(2).addcmul_(dresidual, norm.normed).sum(-2)
        dlast = norm.backward(dnormed)
        return dlast.addcmul_(norm.normed, shrink, value=-1 / derror.shape[-1]), dresidual, dscale
