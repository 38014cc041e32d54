import pytest
import torch
from transformers import AutoModelForCausalLM

from everlong.data import byte_tokenizer
from everlong.models import Retrieval, RetrievalLM, model_config

TOKENIZER = byte_tokenizer()
FILLER = "the king said that nothing would come of nothing and so it was. " * 40


def ids_of(text):
    return torch.tensor(TOKENIZER(text)["input_ids"])


def shortened(text, **options):
    asked = {"passage_tokens": 64, "num_passages": 2, "question_tokens": 20} | options
    return TOKENIZER.decode(Retrieval(TOKENIZER, **asked).shorten(ids_of(text)))


@pytest.mark.parametrize("place", [0, 7, 512, 1500, 2500])
def test_what_is_asked_for_is_found_wherever_it_stands(place):
    text = f"{FILLER[:place]} Mary moved to the bathroom. {FILLER[place:]} Where is Mary now? "
    short = shortened(text)
    assert "Mary moved to the bathroom." in short
    assert short.endswith(text[-20:])
    assert len(short) <= 2 * 64 + 20
    assert shortened(text, num_passages=100) == text


def test_passages_keep_their_order_and_nothing_found_means_the_nearest():
    text = f"Mary took the milk. {FILLER}Mary went home. {FILLER} Where is Mary now? "
    short = shortened(text)
    assert 0 <= short.index("took the milk") < short.index("went home")
    assert shortened(FILLER + "Xylophon quartz zeb? ")[:-21] in FILLER[-150:]


@pytest.mark.parametrize("kind", ["llama", "mamba2"])
def test_a_model_behind_it_reads_what_was_found_and_no_more(kind):
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 259, "eos_token_id": None}
    more = {"head_dim": 16} if kind == "mamba2" else {"num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(model_config(kind, **fields, **more)).eval()
    retrieval = Retrieval(TOKENIZER, passage_tokens=64, num_passages=2, question_tokens=20)
    prompts = [ids_of(FILLER + ask) for ask in ("Where is Mary? ", "Where is the good king? ")]
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts]
    )
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 256}
    got = RetrievalLM(model, retrieval).generate(ids, mask, **asked)
    assert torch.equal(got[:, :width], ids)
    for row, prompt in enumerate(prompts):
        short = retrieval.shorten(prompt)[None]
        want = model.generate(short, attention_mask=torch.ones_like(short), **asked)
        assert torch.equal(got[row, width:], want[0, short.shape[1] :])
    twice = RetrievalLM(model, retrieval).generate(
        ids[:1], num_beams=2, num_return_sequences=2, **asked
    )
    assert twice.shape == (2, width + 5)


@pytest.mark.parametrize("name", ["passage_tokens", "num_passages", "question_tokens"])
def test_sizes_that_make_no_sense(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Retrieval(TOKENIZER, **{name: 0})
