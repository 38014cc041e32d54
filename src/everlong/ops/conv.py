"""Causal depthwise short convolution that continues from call to call."""

import torch
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_t = sum_j weight[:, j] x_{t-J+1+j}: each channel sees its last J inputs.

    x: [B, T, N]; weight: [N, J]; tail: [B, J-1, N], the inputs before x, or None for zeros.
    Returns y [B, T, N] and the tail for the next call.
    """
    kernel = weight.shape[1]
    if tail is None:
        tail = x.new_zeros(x.shape[0], kernel - 1, x.shape[2])
    padded = torch.cat([tail.to(x.dtype), x], dim=1)
    tokens = x.shape[1]
    # A sum of shifted products beats a grouped conv1d here: no transposes, and no tokens are allowed.
    y = padded[:, :tokens] * weight[:, 0]
    for j in range(1, kernel):
        y = torch.addcmul(y, padded[:, j : j + tokens], weight[:, j])
    return y, padded[:, tokens:]
