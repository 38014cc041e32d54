"""What goes to other processes goes there: models, their caches, configurations, data."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from everlong.data import TASKS, byte_tokenizer
from everlong.evaluation.results import ModelInfo
from everlong.evaluation.subject import Subject as Evaluated
from everlong.models import LM2ForCausalLM, Retrieval
from everlong.training.train import _collate
from subjects import SUBJECTS

FIELDS = {
    "needle": [{}, {"num_needles": 2}],
    "babi": [{}],
    "babilong": [{}, {"tokenizer": "own"}],
    "text": [{}, {"documents": "join"}, {"layout": "streams"}, {"streaming": True}],
    "ruler": [{"kinds": ["niah_single_1"]}],
}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_models(subject):
    module, x = subject.make(), subject.inputs(2, 9)
    want, state = subject.read(module, x)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(subject.read(other, x)[0], want)
    if subject.is_model:
        config = pickle.loads(pickle.dumps(module.config))
        assert config.to_dict() == module.config.to_dict()
        state.detach()
    state = pickle.loads(pickle.dumps(state)) if subject.is_model else copy.copy(state)
    assert subject.read(module, x, state)[0].isfinite().all()


@pytest.mark.parametrize("name", TASKS)
def test_data_sets(name, tmp_path):
    text = " ".join(f"Sentence number {i} is here." for i in range(2000))
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"{i} {text}")
    byte_tokenizer().save_pretrained(tmp_path / "own")
    for fields in FIELDS[name]:
        fields = {k: str(tmp_path / v) if v == "own" else v for k, v in fields.items()}
        config = TASKS[name](source=str(tmp_path), length=512, **fields)
        assert pickle.loads(pickle.dumps(config)) == config
        for data in config.datasets(4):
            other = pickle.loads(pickle.dumps(data))
            assert torch.equal(other[1]["input_ids"], data[1]["input_ids"])


def test_processes_that_are_spawned(tmp_path):
    """What is sent there is imported there: no name is found in this process alone."""
    (tmp_path / "text.txt").write_text(" ".join(f"Sentence number {i}." for i in range(5000)))
    data, _ = TASKS["text"](source=str(tmp_path), length=64, validation_source=str(tmp_path)).datasets(
        4
    )
    options = {"num_workers": 1, "multiprocessing_context": "spawn", "collate_fn": _collate}
    batches = list(DataLoader(data, batch_size=2, **options))
    assert torch.equal(batches[0]["input_ids"], _collate([data[0], data[1]])["input_ids"])


def test_what_is_evaluated_and_what_retrieves():
    model = next(subject for subject in SUBJECTS if subject.name == "lmm").make()
    info = ModelInfo("a", "a", "a", "titans", 1, None, None, None, {}, "")
    subject = Evaluated(model, byte_tokenizer(), info)
    assert pickle.loads(pickle.dumps(subject)).info == info
    pickle.loads(pickle.dumps(Retrieval(byte_tokenizer())))


def test_an_lm2_of_a_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=2))
    model = LM2ForCausalLM.from_llama(llama, num_memory_slots=3)
    other = pickle.loads(pickle.dumps(model))
    assert other.model.layers[0].memory.scale.weight.tolist() == [0] * 8
