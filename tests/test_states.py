"""A state that is wrong in any field is refused with a ValueError, by the file's reader or by the call
that takes it: it never reaches a kernel, and never gives a silent result."""

import copy
import functools
import os
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from everlong import NeuralMemoryState
from everlong.models import MemoryCache
from everlong.ops.state import State, save_states
from subjects import SEGMENT, SUBJECTS

EVERY = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
TOKENS = SEGMENT + 3  # a whole segment behind, an open one and an open chunk
ODD = [None, 5, 1.5, "state", (), [], {}, {"a": 1}]


@functools.cache
def right(subject, ragged):
    """A module and what it has read of two rows, of which one is shorter if `ragged`."""
    module, x = subject.make(), subject.inputs(2, TOKENS)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    if ragged:
        mask[1, :2] = False
    with torch.no_grad():
        return module, subject.read_rows(module, x, mask, torch.zeros_like(mask))[1]


def places(value, path=()):
    """The path of everything in a state: states, tuples, and what they hold."""
    yield path
    if isinstance(value, State):
        for field in fields(value):
            yield from places(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from places(item, (*path, i))


def get(value, path):
    for name in path:
        value = value[name] if isinstance(name, int) else getattr(value, name)
    return value


def put(value, path, new):
    """`value` with `new` at the path."""
    if not path:
        return new
    name, rest = path[0], path[1:]
    if isinstance(name, int):
        return (*value[:name], put(value[name], rest, new), *value[name + 1 :])
    return replace(value, **{name: put(getattr(value, name), rest, new)})


def wrong_tensor(x, path, draw):
    """x cut, grown, transposed or of another type."""
    kinds = [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2]
    if "position" in path:
        odd = [x - 100, x + 100, x.double(), x.to(torch.uint16), x[:1], x[None], x > 0]
        return draw(st.sampled_from(odd))
    memory = {"weights", "momentum", "inputs", "errors", "theta", "log_retain", "log_eta"}
    if memory & set(path):  # products of one type; other rows are cast to the tokens' type
        kinds += [torch.float16, torch.float32 if x.dtype == torch.float64 else torch.float64]
    how = draw(st.sampled_from(["cut", "first", "grow", "swap", "cast", "flat", "wider", "sparse"]))
    dim, other = draw(st.permutations(range(x.dim())))[:2] if x.dim() > 1 else (0, 0)
    new = {
        "cut": lambda: x.narrow(dim, 0, max(x.shape[dim] - 1, 0)),
        "first": lambda: x.narrow(dim, 0, min(x.shape[dim], 1)),
        "grow": lambda: torch.cat([x, x.narrow(dim, 0, min(x.shape[dim], 1))], dim),
        "swap": lambda: x.transpose(dim, other),
        "cast": lambda: x.to(draw(st.sampled_from(kinds))),
        "flat": lambda: x.flatten(),
        "wider": lambda: x[None],
        "sparse": lambda: x.to_sparse(),
    }[how]()
    assume((new.shape, new.dtype, new.layout) != (x.shape, x.dtype, x.layout))
    return new


def wrong_attention(state, draw):
    """Keys and values alike with fewer slots, heads or channels."""
    dim = draw(st.sampled_from([1, 2, 3]))
    size = state.keys.shape[dim]
    assume(size)
    least = size - 1 if dim != 2 else 0  # a window may have more slots than it looks at
    return replace(
        state, keys=state.keys.narrow(dim, 0, least), values=state.values.narrow(dim, 0, least)
    )


def wrong(state, draw):
    """A state with one thing wrong in it."""
    path = draw(st.sampled_from([path for path in places(state) if path]))
    value = get(state, path)
    if isinstance(value, torch.Tensor) and draw(st.booleans()):
        return put(state, path, wrong_tensor(value, path, draw))
    if hasattr(value, "keys") and draw(st.booleans()):
        return put(state, path, wrong_attention(value, draw))
    if isinstance(value, tuple) and draw(st.booleans()):
        return put(state, path, draw(st.sampled_from([value[:-1], (*value, value[0])])))
    if "position" in path:
        odd = [-1, 100, None, True, 1.0, torch.tensor([1]), torch.tensor([0, -1]), torch.tensor(1)]
    else:
        odd = [*ODD, torch.zeros(2, 3), torch.zeros(2, 3, 4, 5)]
    new = draw(st.sampled_from(odd))
    assume(not (value is None and new is None))
    return put(state, path, new)


def read(subject, state, like):
    """Read on from a layer's state, or from the states of all layers of a model's cache."""
    module, _ = right(subject, False)
    if subject.is_model:
        cache = copy.deepcopy(like)
        for layer, own in zip(cache.layers, state, strict=True):
            layer.state = own
        state = cache
    with torch.no_grad():
        subject.read(module, subject.inputs(2, 3), state)


def loaded(subject, file):
    """The states in a file, and the cache that holds them."""
    if not subject.is_model:
        return NeuralMemoryState.load(file), None
    cache = MemoryCache.load(file)
    return tuple(layer.state for layer in cache.layers), cache


def check_refused(subject, data):
    """A wrong state, made of a right one, is refused by a call; so is the file it is saved to."""
    _, like = right(subject, data.draw(st.booleans()))
    states = tuple(layer.state for layer in like.layers) if subject.is_model else like
    new = wrong(states, data.draw)
    with pytest.raises(ValueError, match=r"."):
        read(subject, new, like)


@EVERY
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_wrong_states_are_refused(subject, data):
    check_refused(subject, data)


@pytest.mark.slow
@EVERY
@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.data())
def test_wrong_states_are_refused_at_length(subject, data):
    check_refused(subject, data)


@EVERY
@pytest.mark.parametrize("ragged", [False, True])
def test_right_states_are_taken(subject, ragged, tmp_path):
    """The states that are made wrong above are right; from a file too."""
    _, like = right(subject, ragged)
    like.save(tmp_path / "memory.safetensors")
    read(subject, *loaded(subject, tmp_path / "memory.safetensors"))


@EVERY
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_files_of_wrong_states_are_refused(subject, tmp_path_factory, data):
    _, like = right(subject, data.draw(st.booleans()))
    states = tuple(layer.state for layer in like.layers) if subject.is_model else like
    new = wrong(states, data.draw)
    file = tmp_path_factory.mktemp("states") / "memory.safetensors"
    cache = new
    if subject.is_model:
        cache = copy.deepcopy(like)
        for layer, own in zip(cache.layers, new, strict=False):
            layer.state = own
        assume(len(new) == len(cache.layers))
    try:
        cache.save(file)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError):
        return  # no file can hold it
    with pytest.raises(ValueError, match=r"."):
        read(subject, *loaded(subject, file))


def test_a_memory_says_what_it_is():
    """Not a page of numbers: what it is, how much it has read, how large it is."""
    subject = next(s for s in SUBJECTS if s.name == "mac")
    cache = right(subject, False)[1]
    size = sum(x.nbytes for layer in cache.layers for x in layer.state.tensors().values())
    assert cache.nbytes == size
    for part in (f"{TOKENS} tokens", "2 rows", "2 MACState", f"{size / 1024:.4g} KiB", "width 8"):
        assert part in repr(cache), part
    assert repr(cache.layers[0].state) == f"MACState(2 rows, {size / 2048:.4g} KiB)"
    assert "0 tokens read" in repr(MemoryCache(2))


def test_a_loaded_memory_is_apart_from_its_file(tmp_path):
    """What happens to the file later does not reach it; files that are none are left alone."""
    subject = next(s for s in SUBJECTS if s.name == "hybrid")
    cache, path = right(subject, False)[1], tmp_path / "memory.safetensors"
    cache.save(path)
    loaded = MemoryCache.load(path)
    before = [x.clone() for x in subject.leaves(loaded)]
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    for got, want in zip(subject.leaves(loaded), before, strict=True):
        assert torch.equal(got, want)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="it is no file"):
        cache.save(pipe)
    assert pipe.is_fifo()


@pytest.mark.parametrize("made_by", ["[]", "0", '""', "[" * 3000 + "]" * 3000])
def test_a_cache_that_says_nonsense_of_its_model_is_refused(made_by, tmp_path):
    cache = right(SUBJECTS[4], False)[1]
    layers = [[layer.seen, layer.state] for layer in cache.layers]
    save_states({"made_by": made_by, "layers": layers}, tmp_path / "memory")
    with pytest.raises(ValueError, match="damaged"):
        MemoryCache.load(tmp_path / "memory")


@pytest.mark.parametrize("seen", [-1, 1 << 31, 10**30, 1.5, torch.tensor(3)])
def test_counts_of_tokens_have_a_bound(seen):
    cache = copy.deepcopy(right(SUBJECTS[4], False)[1])
    for layer in cache.layers:
        layer.seen = seen
    with pytest.raises(ValueError, match="tokens"):
        cache.check_states()


def test_a_cache_without_layers_says_so():
    cache = MemoryCache(0)
    assert "empty" in repr(cache)
    with pytest.raises(ValueError, match="state for each layer"):
        cache.check_states()


def test_a_checked_state_is_checked_again_before_a_kernel():
    """Its tensors may have been given other data."""
    subject = SUBJECTS[0]
    state = right(subject, False)[1].map(lambda x: x.clone())
    read(subject, state, None)
    state.momentum[0].data = torch.zeros(1, 1, 1, 1, dtype=state.dtype)
    with pytest.raises(ValueError, match=r"momentum\.0"):
        read(subject, state, None)


def test_rows_and_parts_that_do_not_fit_are_refused():
    _, state = right(SUBJECTS[0], False)
    for rows in ([0.9, 1.0], [True, False], [[0, 1]], torch.tensor([1 + 0j])):
        with pytest.raises(ValueError, match="rows must be"):
            state.select(rows)
    other = replace(state, momentum=None, log_eta=None)
    for states in ([state, other], [other, state]):
        with pytest.raises(ValueError, match="cannot be joined"):
            type(state).join(states)
    with pytest.raises(ValueError, match="position"):
        replace(state, position=-1).current()
