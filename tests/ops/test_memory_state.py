"""What can be done with a state: rows, files, devices."""

from pathlib import Path

import pytest
import torch
from memory_cases import make_inputs, run, start_state
from safetensors import SafetensorError

from everlong.ops import NeuralMemoryState, chunk_neural_memory
from numerics import assert_states_close


@pytest.fixture
def state():
    inputs = make_inputs(6, batch=3)
    return run(chunk_neural_memory, inputs, start_state(inputs, 4))[1]


def test_select_and_repeat(state):
    assert_states_close("select", state.select([2, 0]), state.map(lambda t: t[[2, 0]]))
    assert_states_close("last", state.select([-1]), state.map(lambda t: t[[2]]))
    assert_states_close("repeat", state.repeat(2), state.select([0, 0, 1, 1, 2, 2]))
    with pytest.raises(ValueError, match="rows must lie in 0"):
        state.select([3])
    with pytest.raises(ValueError, match="must be indices, got booleans"):
        state.select(torch.tensor([True, False, True]))


def test_detach_cuts_the_history(state):
    assert state.weights[0].requires_grad
    assert not any(t.requires_grad for t in state.detach().tensors().values())


@pytest.mark.parametrize("switches", [{}, {"momentum": False, "decay": False}])
def test_save_and_load(tmp_path, switches):
    inputs = make_inputs(6, **switches)
    _, state = run(chunk_neural_memory, inputs, start_state(inputs, 4))
    state.save(tmp_path / "memory.safetensors")
    loaded = NeuralMemoryState.load(tmp_path / "memory.safetensors")
    assert loaded.tensors().keys() == state.tensors().keys()
    for name, tensor in state.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor), name


def test_damaged_files(tmp_path, state):
    path = tmp_path / "memory.safetensors"
    with pytest.raises(FileNotFoundError, match="no memory state at"):
        NeuralMemoryState.load(path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        state.save(tmp_path / "none" / "memory.safetensors")
    state.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged, cut short or something else"):
        NeuralMemoryState.load(path)
    path.write_text("not tensors")
    with pytest.raises(ValueError, match="damaged, cut short or something else"):
        NeuralMemoryState.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no state of format"):
        NeuralMemoryState.load(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, state, monkeypatch):
    path = tmp_path / "memory.safetensors"
    state.select([0]).save(path)
    whole = path.read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("everlong.ops.state.save_file", full)
    with pytest.raises(OSError, match=r"memory\.safetensors .*No space left"):
        state.save(path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_current_of_an_empty_chunk_is_the_start():
    inputs = make_inputs(4)
    state = start_state(inputs, 4)
    weights, momentum = state.current()
    assert all(torch.equal(a, b) for a, b in zip(weights, state.weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(momentum, state.momentum, strict=True))
