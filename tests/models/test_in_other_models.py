"""Our layers inside a model of someone else, who knows nothing of them."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from everlong import NeuralMemory
from everlong.layers import Attention, Gate, PositionBank, ReleasedBank, RMSNorm, SlotBank, Weight
from numerics import assert_close
from subjects import SUBJECTS

WIDTH = 8
GATES = {"initial_alpha": 1e-3, "initial_eta": 0.7, "initial_theta": 0.2}
LAYERS = {
    "memory": lambda: NeuralMemory(WIDTH, 2, chunk_size=4, **GATES),
    "slots": lambda: SlotBank(WIDTH, 3, initial_scale=0.5, initial_forget=0.9),
    "positions": lambda: PositionBank(WIDTH, 3, initial_scale=0.5),
    "released": lambda: ReleasedBank(WIDTH, 3, initial_scale=0.5),
    "attention": lambda: Attention(WIDTH, 2, 1, 4, 5, 1e4),
    "norm": lambda: RMSNorm(WIDTH),
}
ANY = pytest.mark.parametrize("name", LAYERS)


class TheirConfig(PreTrainedConfig):
    model_type = "of-someone-else"
    initializer_range: float = 0.02


class TheirModel(PreTrainedModel):
    """With the rules that `transformers` has for everything."""

    config_class = TheirConfig

    def __init__(self, config, with_layers=True):
        super().__init__(config)
        self.embed = nn.Linear(WIDTH, WIDTH)
        if with_layers:
            self.layers = nn.ModuleDict({name: make() for name, make in LAYERS.items()})
        self.post_init()

    def forward(self, x):
        return self.layers["memory"](self.embed(x))[0]


class TheirLoudModel(TheirModel):
    """With rules that look for what a module has, not for what it is."""

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            parameter.data.zero_()


def zero_biases(module):
    if isinstance(module, nn.Linear) and module.bias is not None:
        module.bias.data.zero_()


def check_start(layers):
    """Gates, norms, scales and memories begin as their layers say."""
    memory = layers["memory"]
    for gate, want in (
        (memory.alpha_proj, GATES["initial_alpha"] / 2),  # shared by two layers
        (memory.eta_proj, GATES["initial_eta"]),
        (memory.theta_proj, GATES["initial_theta"]),
        (layers["slots"].forget_gate, 0.9),
    ):
        assert_close("gate", torch.sigmoid(gate.bias), torch.full_like(gate.bias, want), torch.float32)
        assert 0 < gate.weight.std() < 2 / WIDTH**0.5
    for norm in (memory.output_norm, layers["norm"], memory.memory_scale):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    for scale in (layers[name].scale.weight for name in ("slots", "positions", "released")):
        assert torch.equal(scale, torch.full_like(scale, 0.5))
    assert layers["released"].gate_bias.weight.tolist() == [0, 1]
    assert torch.equal(layers["released"].input_weight.weight, torch.ones(WIDTH))
    assert 0.3 < memory.memory_init[0].weight.std() < 0.7
    assert 0.5 < layers["slots"].slots.weight.std() < 2
    assert 0 < memory.conv.weight.abs().max() <= 0.5


@pytest.mark.parametrize("kind", [TheirModel, TheirLoudModel])
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_a_start_survives_the_rules_of_another_model(kind, std):
    torch.manual_seed(0)
    check_start(kind(TheirConfig(initializer_range=std)).layers)


@pytest.mark.parametrize("kind", [TheirModel, TheirLoudModel])
def test_what_a_checkpoint_lacks_starts_as_it_should(kind, tmp_path, monkeypatch):
    """A model that was saved before it had our layers; and one of which some parameters are lost."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **more: torch.full(x.shape, torch.nan, **more))
    kind(TheirConfig(), with_layers=False).save_pretrained(tmp_path / "without")
    check_start(kind.from_pretrained(tmp_path / "without").layers)
    model = kind(TheirConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path / "part")
    file = tmp_path / "part" / "model.safetensors"
    kept = load_file(file)
    lost = [key for key in kept if key.endswith(("alpha_proj.bias", "init.0.weight", "slots.weight"))]
    assert len(lost) == 3
    save_file({k: v for k, v in kept.items() if k not in lost}, file, {"format": "pt"})
    fresh = kind(TheirConfig()).layers
    for key, value in kind.from_pretrained(tmp_path / "part").state_dict().items():
        if key not in lost:
            assert torch.equal(value, kept[key]), key
        elif key.endswith("bias"):
            assert torch.equal(value, fresh["memory"].alpha_proj.bias)
        else:
            assert 0.2 < value.std() < 2


def test_what_is_loaded_and_nested_is_left_alone(tmp_path):
    class Outer(PreTrainedModel):
        config_class = TheirConfig

        def __init__(self, config):
            super().__init__(config)
            self.inner = TheirModel.from_pretrained(tmp_path)
            self.post_init()

    model = TheirModel(TheirConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    inner = Outer(TheirConfig()).inner.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(inner[key], value), key


def are_tied(memory):
    q, k, _ = memory.conv.weight.chunk(3)
    return torch.equal(memory.q_proj.weight, memory.k_proj.weight) and torch.equal(q[:, 1:], k[:, :-1])


def test_queries_start_tied(tmp_path):
    """As a layer, after a reset, in a model of someone else, and where a checkpoint lacks the layer."""
    layer = NeuralMemory(WIDTH, 2)
    assert are_tied(layer)
    layer.reset_parameters()
    assert are_tied(layer)
    assert are_tied(TheirModel(TheirConfig()).layers["memory"])
    TheirModel(TheirConfig(), with_layers=False).save_pretrained(tmp_path)
    assert are_tied(TheirModel.from_pretrained(tmp_path).layers["memory"])
    TheirModel(TheirConfig()).save_pretrained(tmp_path / "all")
    loaded = TheirModel.from_pretrained(tmp_path / "all").layers["memory"]
    loaded.reset_parameters()
    assert are_tied(loaded)
    assert not are_tied(NeuralMemory(WIDTH, 2, unit_scale=False))


@pytest.mark.parametrize("how", ["built", "loaded", "a copy of what was loaded"])
def test_initialising_again_leaves_alone_what_was_trained(how, tmp_path):
    model = TheirModel(TheirConfig())
    if how == "built":
        with torch.no_grad():
            for parameter in model.layers.parameters():
                parameter.add_(torch.randn_like(parameter))
    else:
        model.save_pretrained(tmp_path)
        model = TheirModel.from_pretrained(tmp_path)
        with torch.no_grad():
            for parameter in model.layers.parameters():
                parameter.add_(torch.randn_like(parameter))
        model = copy.deepcopy(model) if how.startswith("a copy") else model
    want = {key: value.clone() for key, value in model.layers.state_dict().items()}
    model.init_weights()
    for key, value in model.layers.state_dict().items():
        assert torch.equal(value, want[key]), key


def test_zeroed_biases_leave_gates_alone():
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: make() for name, make in LAYERS.items()})
    check_start(layers.apply(zero_biases))


@ANY
def test_every_parameter_has_a_module_that_resets_it(name):
    """What PyTorch asks of modules that are built on the meta device."""
    with torch.device("meta"):
        layers = nn.ModuleDict({name: make() for name, make in LAYERS.items()})
    layers.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.fill_(torch.nan)
    layers[name].reset_parameters()
    assert all(p.isfinite().all() for p in layers[name].parameters())
    for each in layers.modules():
        if list(each.parameters(recurse=False)):
            each.reset_parameters()
    check_start(layers)


@ANY
def test_layers_are_pickled_and_copied(name):
    layer = LAYERS[name]()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(layer)):
        for key, value in layer.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)
        other.reset_parameters()


def test_weight_decay_of_matrices_leaves_gates_where_they_start():
    """The rule by size, and the Trainer's own by name: no bias of a gate, no norm."""
    torch.manual_seed(0)
    memory = NeuralMemory(WIDTH, 2, **GATES)
    decayed = set(Trainer.get_decay_parameter_names(None, memory))
    gates = {f"{name}_proj.bias" for name in ("alpha", "eta", "theta")}
    assert not decayed & {*gates, "output_norm.weight"}
    matrices = [p for n, p in memory.named_parameters() if n.endswith("weight") and p.ndim == 2]
    optimizer = torch.optim.AdamW(matrices, lr=0.1, weight_decay=1.0)
    for _ in range(100):
        for parameter in matrices:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    (theta, log_retain, log_eta), _ = memory._gates(
        torch.randn(1, 5, WIDTH), torch.randn(1, 5, 2, WIDTH // 2), torch.float32
    )
    assert_close("alpha", -log_retain.expm1(), torch.full_like(theta, 5e-4), torch.float32)
    assert_close("eta", log_eta.exp(), torch.full_like(theta, 0.7), torch.float32)


def test_keys_are_those_of_models_that_were_saved_before():
    """Of a gate too, which was an nn.Linear once."""
    keys = set(NeuralMemory(WIDTH, 2).state_dict())
    assert {f"{name}_proj.{p}" for name in ("alpha", "eta", "theta") for p in ("weight", "bias")} < keys
    linear = nn.Linear(WIDTH, 3)
    gate = Gate(WIDTH, 3, 0.1)
    gate.load_state_dict(linear.state_dict())
    x = torch.randn(2, WIDTH)
    assert torch.equal(gate(x), linear(x))
    assert set(Weight(3, start=nn.init.ones_).state_dict()) == {"weight"}


@pytest.mark.parametrize("name", ["lmm", "lm2-released", "rmt"])
def test_what_a_checkpoint_of_ours_lacks_starts_as_it_should(name, tmp_path):
    """And the rest is loaded."""
    subject = next(subject for subject in SUBJECTS if subject.name == name)
    model = subject.make(torch.float32)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = load_file(file)
    lost = [
        key for key in kept if "theta_proj.bias" in key or "k_proj.bias" in key or "0.mlp.up" in key
    ]
    save_file({k: v for k, v in kept.items() if k not in lost}, file, {"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert lost
    for key, value in kept.items():
        assert torch.equal(loaded[key], value) == (key not in lost), key
    for key in lost:
        if "theta" in key:
            share = torch.full_like(loaded[key], model.config.initial_theta)
            assert_close(key, loaded[key].sigmoid(), share, torch.float32)
