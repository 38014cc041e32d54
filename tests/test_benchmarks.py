"""The benchmarks count, compare, choose and draw as they say."""

import importlib
import json
import mmap
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from everlong.models.sizes import count_parameters
from legible import faults

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    "common", "contenders", "checks", "layer", "op", "training", "reading", "decode", "streaming",
    "plots", "summary", "run", "recall",
)  # fmt: skip


@pytest.fixture(scope="module")
def suite():
    """The suite's modules; they import each other by their plain names."""
    before = dict(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in NAMES:
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


def added_to(out, a, b, *args, out_shape=None, **kwargs):
    """Operations of baddbmm_, which the counter of torch does not know."""
    return bmm_flop(a, b)


COUNTED = {torch.ops.aten.baddbmm_: added_to}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("chunk", "head_dim", "expansion"), [(16, 16, 4), (32, 24, 2)])
def test_the_operations_are_those_of_the_eager_back_end(suite, depth, chunk, head_dim, expansion):
    case = suite.op.OpCase(
        batch=2,
        tokens=4 * chunk,
        heads=3,
        head_dim=head_dim,
        depth=depth,
        expansion=expansion,
        chunk=chunk,
    )
    step = suite.op.op_step(case, "eager", "cpu")
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as forward:
        step()
    assert forward.get_total_flops() == case.operations()
    training = replace(case, training=True)
    step = suite.op.op_step(training, "eager", "cpu")
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as both:
        step()
    assert training.operations() == 3 * case.operations()
    # It computes some of the forward pass again: that is no useful work.
    assert training.operations() <= both.get_total_flops() <= 1.7 * training.operations()


def test_the_layers_operations_are_the_design_notes_count(suite):
    case = suite.contenders.LayerCase()
    key, hidden, chunk = 64, 256, 64
    forward = 2 * 11 * key * hidden + 2 * chunk * (2 * key + 2 * hidden) + 2 * 2 * chunk**2
    assert case.training_operations() == 3 * forward * 6 * 2 * 1024


def test_ratios_are_of_the_same_round(suite):
    samples = {"a": [1.0, 2.0, 4.0], "b": [2.0, 8.0, 8.0], suite.common.MATRIX: [0.5, 0.5, 0.25]}
    assert suite.common.ratio(samples, "a", "b") == {"median": 2.0, "min": 2.0, "max": 4.0}
    product = 2 * 1024**3
    # Of the same round's rate: 1 / 2, 1 / 4, 1 / 16 of the products' rate.
    share = suite.common.share(product, samples, "a", "cpu")
    assert share == {"median": 0.25, "min": 0.0625, "max": 0.5}


def test_who_goes_first_changes(suite, monkeypatch):
    calls = []
    monkeypatch.setattr(suite.common, "SAMPLE_SECONDS", 1e-9)
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = suite.common.time_in_turns(steps, 3, "cpu")
    assert "".join(calls[-9:]) == "abcbcacab"
    assert [len(each) for each in samples.values()] == [3, 3, 3]


def test_a_llama_of_as_many_parameters(suite):
    sizes = suite.contenders.ModelSizes()
    mag = suite.contenders.titans_config("mag", sizes)
    llama = suite.contenders.same_size_llama(mag, sizes)
    counts = count_parameters(mag), count_parameters(llama)
    assert abs(counts[0] - counts[1]) <= 0.01 * counts[0]
    assert llama.model_type == "llama"
    assert llama.num_attention_heads == mag.num_attention_heads
    assert (llama.vocab_size, llama.hidden_size) == (mag.vocab_size, mag.hidden_size)
    with pytest.raises(ValueError, match="parameters"):
        suite.contenders.same_size_llama(mag, sizes, within=1e-9)
    wider = suite.contenders.same_shape_llama(mag, sizes)
    assert abs(counts[0] - count_parameters(wider)) <= 0.01 * counts[0]
    assert (wider.hidden_size, wider.num_attention_heads) == (320, 5)
    assert wider.intermediate_size / 320 == pytest.approx(688 / 256, rel=0.05)


def take(mebibytes):
    """Use so much memory and give it back: the system's own, as the heap may have some left."""
    with mmap.mmap(-1, mebibytes * 2**20) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak that starts anew")
def test_peak_memory_is_what_was_taken_since(suite):
    take(100)
    memory = suite.common.PeakMemory("cpu")
    take(40)
    assert 35 * 2**20 < memory.above() < 60 * 2**20


def test_a_wrong_op_is_not_timed(suite, capsys):
    errors = {"native, float32, depth 2": 1.0, "auto, float64, depth 2": 0.0}
    with pytest.raises(SystemExit, match="nothing was timed"):
        suite.checks.gate(errors, lambda what: 1e-3)
    assert "native" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        suite.checks.gate({"auto": float("nan")}, lambda what: 1e-3)


def test_the_checks_see_an_error(suite, monkeypatch):
    from everlong import ops

    right = ops.chunk_neural_memory
    assert suite.checks.op_error("auto", "float64", 2, "cpu") < 1e-10

    def wrong(q, k, v, theta, *rest, **more):
        return right(q, k, v, 1.001 * theta, *rest, **more)

    monkeypatch.setattr(ops, "chunk_neural_memory", wrong)
    assert suite.checks.op_error("auto", "float64", 2, "cpu") > 1e-5


def test_models_read_in_pieces_as_at_once(suite):
    assert suite.checks.reading_error("mac", "cpu") < suite.checks.READING_TOLERANCE


def test_a_filled_cache_goes_on_like_a_read_one(suite):
    sizes = suite.contenders.TINY_SIZES
    model = suite.contenders.build_model("llama", sizes).eval()
    cache = suite.decode.filled_cache(model, 2, 40)
    assert suite.reading.bytes_of(cache) == 2 * sizes.layers * 2 * 40 * sizes.hidden_size * 4
    with torch.inference_mode():
        suite.decode.block_step(model, cache, 2, sizes.vocabulary, cut=True)()
    assert cache.get_seq_length() == 40


def test_no_gpu_is_said_in_one_line(suite, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.run.main(["--device", "cuda"]) == 0
    assert capsys.readouterr().out == "No GPU that torch can use: nothing measured.\n"


def test_records_are_found_by_size_and_date(suite, tmp_path):
    def write(name, **facts):
        (tmp_path / name).write_text(json.dumps({"benchmark": "op", "device": "cpu", **facts}))

    assert suite.common.load("op", tmp_path) is None
    write("op-quick-2026-01-03.json", size="quick", date="2026-01-03")
    assert suite.common.load("op", tmp_path)["size"] == "quick"
    write("op-2026-01-01.json", size="full", date="2026-01-01")
    write("op-2026-01-02.json", size="full", date="2026-01-02")
    write("op-cuda-2026-01-04.json", size="full", date="2026-01-04", device="cuda")
    (tmp_path / "op-2025-01-01.json").write_text("[]")  # of an older script
    assert suite.common.load("op", tmp_path)["date"] == "2026-01-02"
    assert suite.common.load("op", tmp_path, size="quick")["date"] == "2026-01-03"
    assert suite.common.load("op", tmp_path, "cuda")["date"] == "2026-01-04"
    assert suite.common.load("op", tmp_path, size="tiny") is None


def measured(suite, folder, name, *more):
    """The record of one benchmark, tiny, in this process."""
    getattr(suite, name).main(["--tiny", "--rounds", "1", "--out", str(folder), *more])
    return suite.common.load(name, folder, size="tiny")


@pytest.fixture
def quick(suite, monkeypatch):
    """Without waiting: short samples, no checks twice, children in this process."""
    monkeypatch.setattr(suite.common, "SAMPLE_SECONDS", 1e-9)
    for module in (suite.layer, suite.op):
        monkeypatch.setattr(module, "check_op", lambda device: {})
    for module in (suite.training, suite.decode, suite.streaming):
        monkeypatch.setattr(module, "check_reading", lambda kinds, device: {})

    def here(module, function, *arguments):
        called = getattr(getattr(suite, module), function)
        return json.loads(json.dumps(called(*json.loads(json.dumps(arguments)))))

    for module in (suite.layer, suite.training, suite.decode):
        monkeypatch.setattr(module, "fresh_process", here)
        monkeypatch.setattr(module, "installed", list, raising=False)


def test_measure_draw_and_sum_up(suite, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite.layer, "LAYERS", ("everlong", "gated-deltanet"))
    records = {
        "layer": measured(suite, tmp_path, "layer", "--cases", "1"),
        "op": measured(suite, tmp_path, "op", "--sweeps", "depth"),
        "training": measured(suite, tmp_path, "training", "--models", "llama,mac,mag,lmm"),
        "decode": measured(suite, tmp_path, "decode", "--kinds", "mac", "--positions", "17", "40"),
        "streaming": None,
    }
    positions = records["decode"]["positions"]["mac"]
    assert [place["position"] for place in positions] == [17, 49]  # a segment's phase further on
    assert positions[0]["state_bytes"] == positions[1]["state_bytes"]
    assert set(records["training"]["models"]["speed_over_llama"]) == {"llama", "mac", "mag", "lmm"}

    found = {row[0]: row for row in suite.summary.rows_of(records)}
    assert found["layer, 6 heads of 64, chunk 64: of the products' rate"][3] == "missed"
    assert found["training, mac: speed over titans-pytorch's"][3] == "not measured"
    assert found["decode, growth of the state"][1:] == ["0.0 MiB", "at most 0.0 MiB", "met"]
    assert found["streaming, last speed over first"][3] == "not measured"
    suite.summary.show(records)
    assert "tiny sizes" in capsys.readouterr().out

    pictures = suite.plots.draw(records, tmp_path / "images")
    names = [path.stem.removeprefix("performance-") for path in pictures]
    assert names == ["layer", "op", "training", "lengths", "decode"]
    assert all(path.stat().st_size > 10_000 for path in pictures)
    for benchmark, make in suite.plots.PICTURES.values():
        if (figure := make(records[benchmark]) if records[benchmark] else None) is not None:
            assert faults(figure) == []


@pytest.mark.parametrize("name", ["layer", "op", "training", "lengths", "decode", "streaming"])
def test_pictures_of_the_kept_records_can_be_read(suite, name):
    benchmark, make = suite.plots.PICTURES[name]
    figure = make(suite.common.load(benchmark, BENCHMARKS / "results"))
    assert faults(figure) == []
    labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert not any("$" in label for label in labels)  # powers are no numbers to read


def test_streaming_sums_up_blocks(suite, tmp_path):
    blocks = [{"seconds": 100.0, "bytes": 10}] * 2  # warm-up
    blocks += [{"seconds": 1.0, "bytes": 100}, {"seconds": 1.0, "bytes": 101}]
    blocks += [{"seconds": 50.0, "bytes": 103}, {"seconds": 1.25, "bytes": 102}] * 2
    blocks[-2] = {"seconds": 1.25, "bytes": 100}
    found = suite.streaming.summarise(blocks, 10, 2)
    assert found["speed_of_last_over_first"] == 0.8
    assert found["resident_largest_over_smallest"] == 1.03
    assert suite.streaming.parts(blocks, 10, 2)[1] == (40, 10.0, 101)
    record = {"benchmark": "streaming", "size": "tiny", "block": 10}
    record["kinds"] = {"mac": {"blocks": blocks, **found}}
    bars = {row[0]: row[3] for row in suite.summary.rows_of({"streaming": record})}
    assert bars["streaming, last speed over first"] == "missed"
    assert bars["streaming, resident most over least"] == "missed"
    assert len(suite.plots.draw({"streaming": record}, tmp_path)) == 1


def test_streaming_child_tells_block_by_block(suite):
    from dataclasses import asdict

    sizes = asdict(suite.contenders.TINY_SIZES)
    lines = list(suite.streaming.stream("mac", sizes, 64, 32, "cpu"))
    assert len(lines) == 2
    assert all(line["seconds"] > 0 and line["bytes"] > 2**20 for line in lines)


def test_those_that_recall_are_of_equal_size(suite):
    recall = suite.recall
    job = dict.fromkeys(("heads", "depth"), 2) | {
        "head_dim": 16,
        "chunk_size": 16,
        "task": "mqar",
        "set": {},
    }
    ids, labels = recall.mqar_batch(torch.Generator().manual_seed(0), 2, 96)
    assert ids.max() < 192
    sizes = {}
    for name in recall.MODELS:
        model = recall.build(job | {"model": name, "pairs": 96})
        assert recall.loss_of(model, ids, labels)[0] > 0
        sizes[name] = model.num_parameters()
    for rival in set(recall.MODELS) - set(recall.TITANS):
        assert sizes[rival] == pytest.approx(sizes["lmm"], rel=0.02), sizes
