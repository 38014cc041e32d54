"""Backward passes written by hand have no graph of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_derivatives_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that refuses to be differentiated, when a graph of it is asked for.

    torch's `once_differentiable` complains only where a second pass comes by; `torch.autograd.grad`
    for chosen inputs goes round it, and what the first pass owes to them would be missing in silence.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # within a backward pass: create_graph=True
            raise RuntimeError(
                "the fast form of the memory has first derivatives only: leave create_graph=True out, "
                "or take recurrent_neural_memory, which can be differentiated again and again"
            )
        return backward(ctx, *grads)

    return checked
