"""The needle's score against models whose answers are known."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from everlong.data import NeedleConfig, byte_tokenizer
from everlong.evaluation import NeedleScore, attention_reach, evaluate_needle
from everlong.evaluation.needle import Share, _last_logits
from everlong.models import Retrieval, model_config
from everlong.training import load_recipe
from everlong.training.model import build_model_config


class Oracle(torch.nn.Module):
    """Answers a pass-key question right if the key lies among the last `reach` tokens, otherwise
    with a 0; its cache is the text so far. Like a causal model, it sees only what came before."""

    device = torch.device("cpu")

    def __init__(self, reach=10**9, wrong_at=()):
        super().__init__()
        self.reach = reach
        self.wrong_at = wrong_at
        self.largest_output = 0

    def answer(self, text):
        """The next byte after `text`."""
        ask = text.rfind(b"The pass key is ")
        digit = len(text) - ask - len(b"The pass key is ")
        key = text.find(b"The pass key is ") + len(b"The pass key is ") + digit
        if ask < 0 or key >= len(text) or len(text) - key > self.reach:
            return ord("0")
        if (digit, text[key]) in self.wrong_at:
            return ord("0")
        return text[key]

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
        ids = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        logits = torch.zeros(len(ids), logits_to_keep, 259)
        for row, text in enumerate(bytes(each.tolist()) for each in ids):
            for i in range(logits_to_keep):
                logits[row, i, self.answer(text[: len(text) - logits_to_keep + i + 1])] = 1
        self.largest_output = max(self.largest_output, logits_to_keep)
        return SimpleNamespace(logits=logits, past_key_values=ids if use_cache else None)


@pytest.fixture
def config(text_folder):
    return NeedleConfig(source=str(text_folder))


@pytest.mark.parametrize("piece", [64, 100, 4096])
@pytest.mark.parametrize("length", [300, 64 * 4 + 3])
def test_a_model_that_knows_finds_everything_in_pieces_too(config, length, piece):
    oracle = Oracle()
    read = []
    [score] = evaluate_needle(oracle, config, [length], 7, piece=piece, on_tokens=read.append)
    assert score.exact == Share(7, 7)
    assert score.digits == Share(35, 35)
    assert sum(read) == 7 * length
    assert oracle.largest_output == 6
    assert score.within_reach is None


def test_a_model_that_sees_no_farther_than_its_reach_is_split_by_it(config):
    reach = 150
    [score] = evaluate_needle(Oracle(reach), config, [400], 40, reach=reach)
    assert score.within_reach.samples + score.beyond_reach.samples == 40
    assert score.within_reach.samples > 5
    assert score.beyond_reach.samples > 15
    assert score.within_reach.value > 0.9
    assert score.beyond_reach.value < 0.1
    found = [share.value for share in score.by_depth]
    assert found[:5] == [0.0] * 5
    assert found[-1] == 1.0
    assert sum(share.samples for share in score.by_depth) == 40


def test_with_retrieval_a_short_reach_is_enough(config):
    """And the answers are not part of what is looked for: a wrong question finds nothing."""
    tokenizer = byte_tokenizer()
    oracle = Oracle(reach=400)
    for question_tokens, found in ((64, 40), (1, 5)):
        retrieval = Retrieval(tokenizer, 128, 2, question_tokens)
        [score] = evaluate_needle(oracle, config, [4000], 40, retrieval=retrieval)
        assert abs(score.exact.hits - found) <= 6, question_tokens


def test_what_is_looked_for_holds_no_answer(config):
    asked = []

    class Spy(Retrieval):
        def shorten(self, prompt):
            asked.append(bytes(prompt.tolist()))
            return super().shorten(prompt)

    evaluate_needle(Oracle(), config, [1000], 5, retrieval=Spy(byte_tokenizer(), 128, 2, 64))
    data = config.datasets(5)[1]
    for i, prompt in enumerate(asked):
        whole = bytes(data.sample(i, 1000, depth=(i + 0.5) / 5)["input_ids"].tolist())
        assert prompt == whole[:-5]


def test_teacher_forcing_scores_as_greedy_decoding_does(config):
    """An oracle that is wrong on some keys, in the middle of them."""
    oracle = Oracle(wrong_at={(2, ord("7")), (2, ord("3")), (4, ord("1"))})
    [score] = evaluate_needle(oracle, config, [300], 40)
    dataset = config.datasets(40)[1]
    greedy = 0
    for i in range(40):
        text = bytes(dataset.sample(i, 300, depth=(i + 0.5) / 40)["input_ids"].tolist())
        decoded = text[:-5]
        for _ in range(5):
            decoded += bytes([oracle.answer(decoded)])
        greedy += decoded == text
    assert 0 < greedy < 40
    assert score.exact == Share(greedy, 40)


@pytest.mark.parametrize("kind", ["llama", "titans", "mamba2", "gated_deltanet"])
def test_reading_in_pieces_gives_the_logits_of_reading_at_once(tiny_recipe, kind):
    torch.manual_seed(0)
    if kind in ("llama", "titans"):
        config = build_model_config(load_recipe(tiny_recipe(kind)))
    else:
        more = {"head_dim": 16} if kind == "mamba2" else {"num_attention_heads": 2}
        config = model_config(kind, vocab_size=259, hidden_size=32, num_hidden_layers=2, **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(256, (2, 200))
    with torch.inference_mode():
        whole = _last_logits(model, ids, 6, 4096, lambda tokens: None)
        pieces = _last_logits(model, ids, 6, 64, lambda tokens: None)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-4)


def test_the_score_is_the_same_in_any_batch(config, tiny_recipe):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_model_config(load_recipe(tiny_recipe())))
    scores = [
        evaluate_needle(model, config, [128], 10, tokens_per_forward=tokens)[0]
        for tokens in (128, 1000, 10**6)
    ]
    assert len({score.digits.hits for score in scores}) == 1


def test_wilson_interval():
    assert Share(50, 100).interval() == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert Share(0, 10).interval() == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert Share(100, 100).interval() == pytest.approx((0.9630, 1.0), abs=1e-4)
    assert Share(0, 0).interval() == (0.0, 1.0)
    assert math.isnan(Share(0, 0).value)


def test_reach_is_that_of_windows_alone():
    windows = SimpleNamespace(
        layer_types=["sliding_attention"] * 2, num_hidden_layers=2, sliding_window=64
    )
    assert attention_reach(windows) == 128
    windows.layer_types = ["sliding_attention", "lmm"]
    assert attention_reach(windows) is None
    assert attention_reach(SimpleNamespace()) is None


def test_a_score_survives_json(config):
    [score] = evaluate_needle(Oracle(), config, [200], 3, reach=100)
    assert score.to_json()["exact"]["share"] == 1
    assert NeedleScore.from_json(score.to_json()).to_json() == score.to_json()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "no lengths"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"piece": 8}, "piece must be at least 64 tokens, got 8"),
    ],
)
def test_an_evaluation_of_nothing_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_needle(Oracle(), config, **{"lengths": [200], **options})
