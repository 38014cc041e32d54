"""docs/scaling.md shows what benchmarks/scaling.py has found, and the script counts right."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from everlong.models.sizes import count_parameters

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_last_results(scaling):
    found = json.loads(sorted(scaling.RESULTS.glob("scaling-*.json"))[-1].read_text())
    costs = [scaling.Cost(**row) for row in found["models"]]
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert {cost.name for cost in costs} == set(scaling.MODELS)
    assert scaling.memory_table(costs, found["tokens"]) in page
    assert scaling.time_table(costs) in page
    cost = next(cost for cost in costs if cost.name == "titans-mag-340m")
    assert cost.parameters == count_parameters(scaling.configuration(cost.name))


class Square(nn.Module):
    """A decoder of one matrix."""

    def __init__(self):
        super().__init__()
        self.embed, self.map = nn.Embedding(8, 16), nn.Linear(16, 16, bias=False)

    def forward(self, ids, use_cache):
        from types import SimpleNamespace

        cache = SimpleNamespace(layers=[SimpleNamespace(state=[torch.zeros(3), 7])])
        x = self.map(self.embed(ids)).tanh()
        return SimpleNamespace(last_hidden_state=x, past_key_values=cache)


def test_operations_and_bytes_of_a_known_model(scaling):
    forward, backward, kept, state = scaling.run(Square(), 10)
    assert (forward, backward) == (2 * 10 * 16 * 16, 4 * 10 * 16 * 16)
    # What goes into the matrix, what comes out of tanh, and the ids; no weights.
    assert kept == 2 * 10 * 16 * 4 + 10 * 8
    assert state == 3 * 4
