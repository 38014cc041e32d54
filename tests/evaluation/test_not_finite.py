"""A model whose logits are not finite is not scored: every way to ask it says so."""

import pytest
import torch
from oracles import Reader, subject
from transformers import AutoModelForCausalLM

from everlong.data import byte_tokenizer
from everlong.evaluation import TaskOptions, build_tasks
from everlong.evaluation.likelihood import log_likelihoods
from everlong.evaluation.loading import load_subject
from everlong.models import model_config

TASKS = ("needle", "babi", "niah", "babilong", "perplexity", "context")


class Broken(Reader):
    """A reader with one logit of another value."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[-1, -1, 7] = self.value
        return out


@pytest.mark.parametrize("name", TASKS)
def test_each_task_refuses_a_model_of_nan(name, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"The {i}th of four texts, each longer than it looks. " * 60)
    options = TaskOptions(source=str(tmp_path))
    for task in build_tasks([name], [1024], options)[:2]:
        length = 1024 if task.has_lengths else None
        with pytest.raises(
            ValueError, match=r"model \(model\) cannot be evaluated: it gives logits of nan"
        ):
            list(task.run(subject(Broken(torch.nan)), length, [0], 1))


def test_so_do_likelihoods_and_texts():
    ids = torch.zeros(1, 9, dtype=torch.long)
    for value in (torch.nan, torch.inf):
        model = subject(Broken(value))
        with pytest.raises(ValueError, match=f"logits of {value}"):
            list(log_likelihoods(model, [((1, 2), (3,)), ((1, 2), (3, 4))]))
        with pytest.raises(ValueError, match=f"logits of {value}"):
            model.generate(ids, 3)
    never = subject(Broken(-torch.inf))  # a token that is never said
    assert never.generate(ids, 3) == ["000"]
    assert never.losses(ids)[0].isfinite().all()


def test_a_saved_model_of_nan_is_refused_before_any_work(tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(model_config("llama", intermediate_size=16, **sizes))
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.* logits of nan in float32"):
        load_subject(tmp_path)
