"""RULER's needles: exact lengths for any tokenizer, and what a sample says."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from everlong.data import RulerConfig, byte_tokenizer, load_text, ruler, split, train_tokenizer
from everlong.data.haystack import IGNORE
from everlong.data.ruler import KINDS, Needles, sentences, string_match_all

NUMBER, UUID = r"[1-9]\d{6}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS = r"[a-z]+-[a-z]+"
FORMS = {"numbers": NUMBER, "uuids": UUID, "words": WORDS}
SAID = re.compile(r"One secret (?:number|uuid) of (\S+) is (\S+)\.(?=\s)")
PROSE = "The {}th of ten short texts, told often, in Köln. Who knows it? Nobody does! "


def metaspace(texts):
    """As SentencePiece has it: a blank before the first word, bytes for what is unknown, a bos."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=800, show_progress=False)
    backend.train_from_iterator([text.replace("\n", " ") for text in texts], trainer)
    learnt = json.loads(backend.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    merges = [tuple(pair) for pair in learnt["merges"]]
    backend.model = models.BPE(
        {name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    start = [("<s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prose")
    for i in range(10):
        (folder / f"{i}.txt").write_text(PROSE.format(i) * 20, encoding="utf-8")
    return load_text(folder)


@pytest.fixture(scope="module")
def samplers(documents):
    texts = [document.text.decode() for document in documents]
    lines = [*texts, *(f"One secret number of azure-cup is {i}." for i in range(10**6, 10**6 + 99))]
    tokenizers = {
        "bytes": byte_tokenizer(),
        "bpe": train_tokenizer(lines, 700),
        "opening": with_bos(train_tokenizer(lines, 700)),
    }
    return {name: Needles(documents, tokenizer) for name, tokenizer in tokenizers.items()}


def with_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return tokenizer


def sample(needles, kind, length, seed=0, **options):
    made = needles.sample(kind, length, np.random.default_rng(seed), **options)
    return made, needles.coder.text(made.prompt)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["bytes", "bpe", "opening"])
def test_a_prompt_and_its_answer_are_as_long_as_asked(samplers, name, kind):
    needles = samplers[name]
    needles.check(kind)
    shortest = needles.shortest(kind)
    for length in (shortest, shortest + 1, 1500, 2047):
        for seed in range(3):
            made, text = sample(needles, kind, length, seed)
            assert len(made.prompt) + made.new_tokens == length
            assert made.new_tokens == 128
            assert all(value in text for value in made.wanted)
            opening = needles.coder.opening
            assert made.prompt[: len(opening)].tolist() == opening == ([1] if name == "opening" else [])


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_a_sample_says(samplers, kind):
    told = KINDS[kind]
    for seed in range(5):
        made, text = sample(samplers["bytes"], kind, 4000, seed)
        body, _, question = text.rpartition("What ")
        pairs = SAID.findall(body)
        if told.haystack == "needles":
            assert len(pairs) > 20
        else:
            assert len(pairs) == told.num_keys * told.num_values
        keys = {key for key, _ in pairs}
        assert all(re.fullmatch(FORMS[told.keys], key) for key in keys)
        assert all(re.fullmatch(FORMS[told.values], value) for _, value in pairs)
        queried = re.findall(FORMS[told.keys], question.rpartition(" of ")[2])
        assert len(queried) == len(set(queried)) == told.num_queries
        given = [value for query in queried for key, value in pairs if key == query]
        assert given == list(made.wanted)
        assert len(given) == told.num_answers
        assert text.endswith(" is" if len(given) == 1 else " are")
        assert made.answer.startswith(" ")
        assert made.answer.endswith(f"{given[-1]}.")
        assert body.count("A cart went by.") > 20 if told.haystack == "repeat" else "cart" not in body
        assert ("short texts" in body) == (told.haystack == "essay")


def test_the_text_is_written_as_the_tokenizer_writes_it_whole(samplers):
    for kind in KINDS:
        made, text = sample(samplers["bpe"], kind, 1000)
        whole = samplers["bpe"].coder.tokenizer(text)["input_ids"]
        # The haystack is cut at its start, which may be within a word.
        assert whole[-700:] == made.prompt.tolist()[-700:]


@pytest.mark.parametrize("kind", ["niah_single_1", "niah_single_2", "niah_single_3"])
def test_a_needle_stands_where_it_is_asked_for(samplers, kind):
    for depth in (0.0, 0.3, 0.77, 1.0):
        made, text = sample(samplers["bytes"], kind, 8000, depth=depth)
        assert made.depth == pytest.approx(depth, abs=0.03)
        assert text.index(made.wanted[0]) / len(text) == pytest.approx(depth, abs=0.06)


def test_depth_is_that_of_the_one_asked_for(samplers):
    for seed in range(5):
        made, text = sample(samplers["bytes"], "niah_multikey_1", 8000, seed)
        assert text.index(made.wanted[0]) / len(text) == pytest.approx(made.depth, abs=0.06)
        assert sample(samplers["bytes"], "niah_multivalue", 8000, seed)[0].depth is None


def test_the_random_numbers_decide(samplers):
    for kind in KINDS:
        one, again, other = (sample(samplers["bpe"], kind, 1000, seed)[0] for seed in (1, 1, 2))
        assert np.array_equal(one.prompt, again.prompt)
        assert one.wanted != other.wanted


@pytest.mark.parametrize("kind", ["niah_single_2", "niah_multikey_2", "niah_multikey_3"])
def test_long_texts(documents, kind, monkeypatch):
    """The prose goes round; the lines' numbers and uuids are some of many."""
    monkeypatch.setattr(ruler, "POOL", 400)
    needles = Needles(documents, byte_tokenizer())
    made, text = sample(needles, kind, 100_000)
    assert len(made.prompt) + 128 == 100_000
    key, pairs = re.search(r"of (\S+), as", text)[1], SAID.findall(text)
    assert [value for each, value in pairs if each == key] == list(made.wanted)
    values = {value for _, value in pairs}
    assert len(pairs) == 1 or 300 < len(values) < len(pairs) - 200


def test_texts_that_are_too_short_are_refused(samplers):
    needles = samplers["bytes"]
    with pytest.raises(
        ValueError, match=r"length 200 is too short for niah_single_3.* Take \d+ or more"
    ):
        sample(needles, "niah_single_3", 200)


def test_a_tokenizer_that_begins_every_text_with_a_blank(documents):
    needles = Needles(documents, metaspace([document.text.decode() for document in documents]))
    for kind in ("niah_single_1", "niah_single_2", "niah_multikey_2"):
        needles.check(kind)
        made, text = sample(needles, kind, 3000)
        assert len(made.prompt) + 128 == 3000
        assert made.prompt[0] == 1
        assert "  " not in text
        assert SAID.search(text)[2] == made.wanted[0] or kind == "niah_multikey_2"


def test_tokenizers_that_lose_some_of_the_text_are_refused(documents):
    small = train_tokenizer(["a text"], 300)
    small.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"cannot write the task's text.*The text.* comes back as"):
        Needles(documents, small).check("niah_single_1")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "One": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknowing = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", name_or_path="words")
    with pytest.raises(ValueError, match="the tokenizer words cannot write"):
        Needles(documents, unknowing).check("niah_single_1")


def test_a_chat_template_surrounds_the_question(documents):
    tokenizer = train_tokenizer(["a text"], 300)
    with pytest.raises(ValueError, match="has no chat template"):
        Needles(documents, tokenizer, chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<bos>user {{ m['content'] }}<eos>{% endfor %}<bos>assistant:{{ ' ' }}"
    )
    needles = Needles(documents, tokenizer, chat=True)
    made, text = sample(needles, "niah_single_2", 3000)
    assert len(made.prompt) + 128 == 3000
    assert made.prompt[0] == tokenizer.bos_token_id
    assert made.prompt.tolist().count(tokenizer.eos_token_id) == 1
    assert text.startswith("<bos>user The text below")
    assert "as the text has it?<eos><bos>assistant: As the text has it, the secret number of " in text


def test_sentences():
    assert list(sentences('One.  Two\nis  "it!" Three')) == ["One.", 'Two is "it!"', "Three"]
    assert [len(each.split()) for each in sentences("word " * 130)] == [60, 60, 10]


def test_the_score_is_the_share_of_what_is_wanted():
    assert string_match_all("It is 1234567.", ["1234567"]) == 1
    assert string_match_all("aBc, and 5", ["AbC", "4", "5", "6"]) == 0.5
    assert string_match_all("", ["1"]) == 0


@pytest.fixture
def config(text_folder):
    return RulerConfig(kinds=list(KINDS), source=str(text_folder), length=800)


def test_what_is_trained_is_the_answer_and_its_end(config):
    train, test = config.datasets(30)
    tokenizer = config.build_tokenizer()
    seen = set()
    for item in [*(train[i] for i in range(30)), *(test[i] for i in range(5))]:
        ids, labels = item["input_ids"], item["labels"]
        assert len(ids) == len(labels) == 800
        is_answer = labels != IGNORE
        count = int(is_answer.sum())
        assert is_answer[-count:].all()
        assert labels[is_answer].tolist() == ids[-count:].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        prompt, answer = tokenizer.decode(ids[:-count]), tokenizer.decode(ids[-count:-1])
        assert re.search(r" As the text has it, the secret \w+ of .+ (is|are)$", prompt)
        assert answer.startswith(" ")
        assert answer.endswith(".")
        values = re.split(r", | and ", answer[1:-1])
        assert all(f" is {value}." in prompt for value in values)
        seen.add(re.search(r"What .*? of", prompt)[0])
    assert len(seen) == 3


def test_training_and_held_out_share_nothing(config, text_folder):
    config = replace(config, kinds=["niah_single_2"])
    train, test = (
        {bytes(data[i]["input_ids"][:-1].tolist()) for i in range(20)} for data in config.datasets(20)
    )
    held_out = {document.name for document in split(load_text(text_folder))[1]}
    for texts, mine in ((train, False), (test, True)):
        told = {int(each) for text in texts for each in re.findall(rb"The (\d)th", text)}
        assert told
        assert all((f"{each}.txt" in held_out) == mine for each in told)
    keys = [{re.search(SAID.pattern.encode(), each)[2] for each in texts} for texts in (train, test)]
    assert not keys[0] & keys[1]


def test_lengths_grow_and_other_tokens_may_count(config):
    config = replace(config, kinds=["niah_single_1"], start_length=480, growth_steps=10, text_loss=0.5)
    train, test = config.datasets(40, batch=2)
    assert [len(train[i]["input_ids"]) for i in (0, 1, 39)] == [480, 480, 800]
    assert len(test[0]["input_ids"]) == 800
    share = float((train[39]["labels"] != IGNORE).float().mean())
    assert 0.4 < share < 0.6
    assert (train[0]["input_ids"] == config.datasets(40, batch=2)[0][0]["input_ids"]).all()
    assert (train[0]["input_ids"] != config.datasets(40, seed=1)[0][0]["input_ids"][:480]).any()


def test_another_text_is_another_fingerprint(config, text_folder):
    before = config.fingerprint()
    (text_folder / "0.txt").write_text("Something else.")
    assert config.fingerprint() != before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kinds": []}, "kinds is empty"),
        ({"kinds": ["niah"]}, "unknown kind 'niah' in kinds: known are niah_single_1"),
        ({"text_loss": 2.0}, "text_loss is a share"),
    ],
)
def test_a_config_of_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RulerConfig(**fields)


def test_a_length_that_is_too_short_to_train_is_refused(config):
    with pytest.raises(ValueError, match="length 300 is too short for niah_single_3: take"):
        replace(config, kinds=["niah_single_3"], length=300).datasets(1)
