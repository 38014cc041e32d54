"""What is made again on the way back gives the same gradients, and is not kept."""

import weakref

import pytest
import torch

from everlong.layers import RMSNorm
from everlong.ops import use_backend
from everlong.ops.recompute import recomputed


class Counted:
    """A function that keeps its input alone, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, shift=None):
        self.calls += 1
        return Twice.apply(x)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def weights():
    torch.manual_seed(0)
    return [torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def loss_of(x, a, b, function, times=1, keep=None):
    """Both of y = f(x) and of its transpose something is made."""
    with recomputed(function, x, None) as y:
        if keep is not None:
            keep.append(weakref.ref(y))
        return sum((y @ a).square().sum() + (y.T @ b).sum() for _ in range(times))


def test_gradients_and_what_is_kept():
    x, a, b = weights()
    y = 2 * x
    want = torch.autograd.grad((y @ a).square().sum() + (y.T @ b).sum(), [x, a, b])
    function, kept = Counted(), []
    loss = loss_of(x, a, b, function, keep=kept)
    assert kept[0]() is None
    assert function.calls == 1
    for again in (True, False):
        got = torch.autograd.grad(loss, [x, a, b], retain_graph=again)
        assert all(map(torch.equal, got, want))
    # Once for both products, in each of the two passes.
    assert function.calls == 3


def test_one_in_another():
    x, a, b = weights()
    inner, outer, kept = Counted(), Counted(), []
    with recomputed(outer, x) as y:
        middle = y @ a
        with recomputed(inner, middle) as z:
            kept += [weakref.ref(y), weakref.ref(z)]
            loss = (y * (z @ b)).sum()
    del y, z
    assert [ref() for ref in kept] == [None, None]
    got = torch.autograd.grad(loss, [x, a, b])
    want = torch.autograd.grad((2 * x * (2 * (2 * x @ a) @ b)).sum(), [x, a, b])
    assert all(map(torch.allclose, got, want))


def test_the_plans_of_others_go_first():
    x, a, _ = weights()
    function, seen = Counted(), []

    def pack(tensor):
        seen.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with recomputed(function, x) as y:
            loss = (y @ a).sum()
        assert y.data_ptr() in seen
    loss.backward()
    assert function.calls == 1


def test_what_was_changed_meanwhile_is_refused():
    for changed in range(2):
        x, a, b = weights()
        y = x.clone()
        loss = loss_of(y, a, b, Counted())
        with torch.no_grad():
            (y, a)[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class Exp(torch.autograd.Function):
    """Keeps its own output."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0] * dy


def test_a_node_without_use_is_not_kept_for_ever():
    x, _, _ = weights()
    with recomputed(Counted(), x) as y:
        unused = Exp.apply(y)
    node = weakref.ref(unused.grad_fn)
    del unused, y
    assert node() is None


def test_empty_outputs():
    """No tensor lies in nothing."""
    empty = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    with recomputed(Counted(), empty) as y:
        torch.where(torch.zeros(0, 4, dtype=torch.bool), y, 1.0).sum().backward()
    assert empty.grad.shape == (0, 4)


def test_the_back_end_of_the_way_there_makes_it_again():
    """The other one would lay it out otherwise."""
    torch.manual_seed(0)
    norm = RMSNorm(8).double()
    x, w = (
        torch.randn(2, 5, 3, 8).double().transpose(1, 2).requires_grad_(),
        torch.randn(24, 8).double(),
    )
    w.requires_grad_()
    found = []
    for there, back in (("auto", "auto"), ("auto", "eager"), ("eager", "auto")):
        with use_backend(there), norm.unkept(x) as y:
            loss = (y.transpose(1, 2).flatten(2) @ w).square().sum()
        with use_backend(back):
            found.append(torch.autograd.grad(loss, [x, w, norm.weight]))
    for other in found[1:]:
        assert all(map(torch.allclose, other, found[0]))


def test_a_norm_whose_weight_was_changed_is_refused():
    norm = RMSNorm(4).double()
    x, w, _ = weights()
    with norm.unkept(x) as y:
        loss = (y @ w).sum()
    with torch.no_grad():
        norm.weight.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, [w])


def test_a_norm_with_hooks_is_asked_once():
    norm, calls = RMSNorm(4).double(), []

    def drop(module, inputs, output):
        calls.append(1)
        return torch.nn.functional.dropout(output, 0.5, True)

    norm.register_forward_hook(drop)
    x, w, _ = weights()
    with norm.unkept(x) as y:
        got = torch.autograd.grad((y @ w).sum(), [w])[0]
    assert len(calls) == 1
    assert torch.allclose(got, y.sum(0)[:, None].expand(4, 4))


@pytest.mark.parametrize("wanted", [True, False])
def test_without_gradients_nothing_is_done(wanted):
    x, a, _ = weights()
    with torch.set_grad_enabled(wanted), recomputed(Counted(), x.detach()) as y:
        assert torch.equal(y @ a, 2 * x @ a)


def test_parts_of_it_are_made_again_too():
    """Also where what is asked again lies in what an outer one makes again."""
    x, a, _ = weights()
    outer, inner, kept = Counted(), Counted(), []
    with recomputed(outer, x) as y:
        for part in y.split(2):
            with recomputed(inner, part) as z:
                kept += [weakref.ref(y), weakref.ref(part), weakref.ref(z)]
                kept.append((z.T @ a[:2] * part.sum()).square().sum())
    loss = sum(kept[3::4])
    del y, z, part
    assert all(ref() is None for i, ref in enumerate(kept) if i % 4 < 3)
    got = torch.autograd.grad(loss, [x, a])
    parts = (2 * x).split(2)
    want = sum(((2 * part).T @ a[:2] * part.sum()).square().sum() for part in parts)
    assert all(map(torch.allclose, got, torch.autograd.grad(want, [x, a])))
    assert (outer.calls, inner.calls) == (2, 4)


def test_what_lies_between_its_numbers_is_not_its_own():
    x, a, _ = weights()
    made = []

    def left(x):
        made.append(torch.randn(4, 8, dtype=torch.float64))
        with torch.no_grad():
            made[-1][:, :4] = 2 * x
        return Given.apply(x, made[-1])

    with recomputed(left, x) as y:
        right = made[0][:2, 4:]
        loss = (y @ a).sum() + (x[:, :2] @ right).sum()
    got = torch.autograd.grad(loss, [x, a])
    want = torch.autograd.grad((2 * x @ a).sum() + (x[:, :2] @ right).sum(), [x, a])
    assert all(map(torch.allclose, got, want))
    assert len(made) == 2


class Given(torch.autograd.Function):
    """2 x, which lies in a tensor that holds more."""

    @staticmethod
    def forward(ctx, x, whole):
        return whole[:, :4]

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy, None
