import itertools
import math
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import pytest
from fake_results import BABILONG, K, fake_models, fake_results, fake_samples
from matplotlib.image import imread
from rich.console import Console

from everlong.evaluation.page import write_html
from everlong.evaluation.plots import draw, pictures
from everlong.evaluation.report import print_tables, to_markdown, write_report
from everlong.evaluation.results import Cell, Estimate, Metric, ModelInfo, Point, Results, TaskInfo
from everlong.evaluation.tables import (
    chapters,
    family_columns,
    for_markdown,
    number,
    rows_of,
    task_tables,
    title_of,
)
from everlong.pictures import new_figure, spread, svg_of
from everlong.words import plain
from legible import faults


def model(name, label=None, seed=None):
    return ModelInfo(name, label or name, f"runs/{name}", "titans", 1000, seed, training_length=512)


def needle(name, length, hits, samples=100, **fields):
    return Cell("needle", name, length, {"exact": Estimate.of_hits(hits, samples)}, **fields)


def results_of(models, cells, **task):
    info = {"name": "needle", "title": "Needle", "about": "Find it.", "metrics": {"exact": EXACT}}
    return Results([TaskInfo(**{**info, **task})], models, cells, provenance={"date": "2026-11-25"})


EXACT = Metric("whole keys right")


def rows(table):
    return [row for _, block in table.blocks for row in block]


def test_a_cell_has_the_interval_of_one_seed_and_the_spread_of_several():
    models = [model("a 0", "a", 0), model("a 1", "a", 1), model("b")]
    cells = [
        needle("a 0", 512, 100),
        needle("a 1", 512, 90),
        needle("a 0", 2 * K, 80),
        needle("a 1", 2 * K, 40),
        needle("b", 512, 98),
    ]
    (table,) = task_tables(results_of(models, cells), results_of(models, cells).tasks[0])
    assert table.markdown() == (
        "whole keys right, % · in brackets the 95% interval · of several seeds the mean "
        "(lowest-highest) · 100 samples each:\n\n"
        "| model | 512 | 2K |\n"
        "| --- | ---: | ---: |\n"
        "| a, 2 seeds | 95 (90-100) | 60 (40-80) |\n"
        "| b | 98 (93-99) | - |\n"
    )


def test_a_seed_that_is_missing_is_said():
    models = [model("a 0", "a", 0), model("a 1", "a", 1)]
    results = results_of(
        models, [needle("a 0", 512, 100), needle("a 1", 512, 90), needle("a 0", K, 98)]
    )
    assert rows(task_tables(results, results.tasks[0])[0])[0][1:] == [
        "95 (90-100)",
        "98 (93-99), 1 seed",
    ]


def test_models_of_one_label_that_are_no_seeds_stay_apart():
    models = [model("a, step 100", "a"), model("a, step 200", "a"), model("b")]
    assert list(rows_of(results_of(models, []))) == ["a, step 100", "a, step 200", "b"]


def test_samples_are_said_once_or_for_each_length():
    cells = [needle("a", 512, 50), needle("a", K, 10, samples=20)]
    results = results_of([model("a")], cells)
    (table,) = task_tables(results, results.tasks[0])
    assert table.head == ["model", "512, n 100", "1K, n 20"]
    assert "samples" not in table.caption


def test_numbers():
    bits = Metric("bits a byte", is_share=False, higher_is_better=False)
    values = [2.0951, 12.3, 999.97, 12345.6, math.nan, math.inf, -1.5]
    assert [number(each, bits) for each in values] == [
        "2.095", "12.30", "1,000", "12,346", "-", "-", "-1.500"
    ]  # fmt: skip
    assert number(0.3333, EXACT) == "33"
    assert number(0.3333, EXACT, samples=1000) == "33.3"
    assert title_of(bits) == "bits a byte (lower is better)"
    assert title_of(replace(EXACT, chance=1 / 6)) == "whole keys right, % (chance 17%)"


def test_intervals_stay_within_shares_and_may_be_unknown():
    share = Metric("values found")
    low = Estimate(0.02, -0.03, 0.07, 30)
    one = Estimate.of([0.5])
    cells = [Cell("needle", "a", 512, {"exact": low}), Cell("needle", "a", K, {"exact": one})]
    results = results_of([model("a")], cells, metrics={"exact": share})
    assert rows(task_tables(results, results.tasks[0])[0]) == [["a", "2 (0-7)", "50"]]


def test_what_lies_beyond_the_reach_is_said():
    nothing = {"value": None, "samples": 0}  # NaN as it is read back from JSON
    more = [
        {"within_reach": {"value": 10 / 30, "samples": 30}, "beyond_reach": nothing},
        {"within_reach": {"value": 2 / 6, "samples": 6}, "beyond_reach": {"value": 0.0, "samples": 94}},
    ]
    cells = [needle("a", 512 * (i + 1), 5, more=each) for i, each in enumerate(more)]
    results = results_of([model("a"), model("b")], [*cells, needle("b", 512, 9)])
    assert task_tables(results, results.tasks[0])[0].notes == [
        "a finds 12 of the 36 answers within its attention's reach and none of the 94 beyond."
    ]


def test_a_family_is_one_table_with_the_mean_of_its_tasks():
    results = fake_results(count=2, seeds=1, babilong=(K, 2 * K))
    gone = [each for each in results.cells if each.task != "babilong_qa5" or each.length != 2 * K]
    results.cells = gone
    chapter = next(each for each in chapters(results) if each.is_family)
    (table,) = chapter.tables
    assert table.head == ["model", "qa1", "qa2", "qa3", "qa4", "qa5", "mean"]
    assert [name for name, _ in table.blocks] == ["1K tokens", "2K tokens"]
    assert table.notes == ["Guessing gives: qa1 17%, qa2 17%, qa3 17%, qa4 17%, qa5 14%, mean 16%."]
    first = table.blocks[0][1][1]
    assert first[0] == "lm2"
    assert first[6].split()[0] == f"{sum(map(float, first[1:6])) / 5:.0f}"
    assert table.blocks[1][1][1][5:] == ["-", "-"]  # no mean of some of the tasks


def test_the_interval_of_a_mean_is_that_of_independent_parts():
    results = fake_results(count=1, seeds=1, babilong=(64 * K,))
    *columns, mean = family_columns(results, BABILONG, 64 * K)
    (name,) = mean.found
    parts = [column.found[name] for column in columns]
    whole = Estimate.of_hits(sum(part.hits for part in parts), sum(part.samples for part in parts))
    assert mean.found[name].value == pytest.approx(whole.value)
    assert mean.found[name].low == pytest.approx(whole.low, abs=0.02)
    assert mean.found[name].high == pytest.approx(whole.high, abs=0.02)


def test_tasks_without_lengths_share_a_table_and_groups_have_their_own():
    results = fake_results(count=3, seeds=1)
    chapter = next(each for each in chapters(results) if each.name == "")
    (table,) = chapter.tables
    assert table.head[1] == "MMLU: right choices, % (chance 25%), n 2,000"
    assert table.head[3] == "WikiText: perplexity of a word (lower is better), n 62"
    assert rows(table)[2][0] == "llama-window"
    assert rows(table)[2][3] == "-"
    (groups,) = task_tables(results, chapter.tasks[0])
    assert groups.head == ["model", "Humanities", "Other", "STEM", "Social Sciences"]


def test_many_groups_are_rows():
    groups = [f"subject {i}" for i in range(20)]
    cells = [needle("a", None, 5 + i, group=group) for i, group in enumerate(groups)]
    results = results_of([model("a"), model("b")], [needle("a", None, 9), *cells], axis=None)
    table = task_tables(results, results.tasks[0])[-1]
    assert table.head == ["", "a"]
    assert rows(table)[3][:1] == ["subject 3"]
    assert rows(table)[3][1].startswith("8 (")


def test_positions_are_columns():
    results = fake_results(count=4, seeds=1)
    task = results.tasks[-1]
    (table,) = task_tables(results, task)
    assert table.head == [
        "model", "0-1K", "1K-2K", "2K-4K", "4K-8K", "8K-16K", "16K-32K", "32K-64K", "64K-128K", "all"
    ]  # fmt: skip
    assert rows(table)[3][7:9] == ["-", "-"]
    assert re.fullmatch(r"2\.\d{3} \(2\.\d{3}-2\.\d{3}\)", rows(table)[3][1])


def test_the_terminal_shows_every_number(capsys):
    results = fake_results(count=2, seeds=2, babilong=(K, 2 * K))
    print_tables(results, Console(width=60))
    text = "".join(capsys.readouterr().out.split())
    for table in [*chapters(results)[1].tables, *task_tables(results, results.tasks[0])]:
        for cell in rows(table)[0][1:]:
            value = cell.split()[0]
            assert value in text
    assert "…" not in text
    print_tables(results_of([model("[red]a[/]")], [needle("[red]a[/]", 512, 5)]))
    assert "[red]a[/]" in capsys.readouterr().out


@pytest.mark.parametrize("asked", [{"count": 9}, {"count": 9, "long_names": True}, {"count": 1}])
def test_no_number_is_folded_on_a_narrow_terminal(asked, capsys):
    results = fake_results(seeds=1, **asked)
    print_tables(results, Console(width=80))
    text = capsys.readouterr().out
    for chapter in chapters(results):
        for table in [
            *chapter.tables,
            *(t for task in chapter.tasks for t in task_tables(results, task)),
        ]:
            if chapter.is_family and table not in chapter.tables:
                continue
            for cell in {cell for row in rows(table) for cell in row[1:]}:
                assert cell in text


def test_markdown_survives_bars_in_names():
    results = results_of([model("a|b")], [needle("a|b", 512, 5)])
    assert "| a\\|b | 5 (2-11) |" in to_markdown(results, [])


def test_a_report_is_files_that_can_be_read_again(tmp_path):
    results = fake_results(2, 2, lengths=(K, 4 * K), babilong=(K, 2 * K), stories=2)
    files = write_report(results, tmp_path / "deep", fake_samples(results))
    assert all(path.is_file() for path in files)
    names = {path.name for path in files}
    assert {"results.json", "results.md", "report.html", "needle.png", "needle.svg"} <= names
    assert {"needle-depth.png", "babilong-tasks.svg", "babilong-mean.png", "scores.png"} <= names
    assert {"mmlu-groups.png", "perplexity.png"} <= names
    again = Results.load(tmp_path / "deep" / "results.json")
    text = (tmp_path / "deep" / "results.md").read_text()
    assert to_markdown(again, []) == re.sub(r"!\[.*\]\(.*\)\n\n", "", text)
    for link in re.findall(r"\]\((.*)\)", text):
        assert (tmp_path / "deep" / link).is_file()


def test_pictures_are_of_what_is_there(tmp_path):
    by_depth = [Estimate.of_hits(1, 2)] * 10
    curve = results_of([model("a")], [needle("a", 512, 5), needle("a", K, 5)])
    depth = results_of([model("a")], [needle("a", 512, 5, by_depth=by_depth), needle("a", K, 5)])
    assert [path.name for path in draw(curve, tmp_path)] == ["needle.png", "needle.svg"]
    assert [picture.name for picture in pictures(depth)] == ["needle", "needle-depth"]
    assert draw(results_of([model("a")], []), tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_the_curves_show_every_model(tmp_path):
    hits = {"a 0": (100, 90), "a 1": (98, 70), "b": (40, 0)}
    models = [model("a 0", "a", 0), model("a 1", "a", 1), model("b")]
    cells = [needle(name, K * (1 + i), hit) for name in hits for i, hit in enumerate(hits[name])]
    draw(results_of(models, cells), tmp_path)
    pixels = imread(tmp_path / "needle.png")
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        seen = (abs(pixels[..., :3] * 255 - colour) < 2).all(-1)
        assert seen.sum() > 500


def test_the_heat_map_starts_at_the_top_and_hatches_what_is_missing():
    nothing, all_, none = Estimate.of_hits(0, 0), Estimate.of_hits(10, 10), Estimate.of_hits(0, 10)
    cells = [
        needle("a", 512, 5, by_depth=[all_] * 3 + [none] * 7),
        needle("a", K, 5, by_depth=[nothing] * 5 + [none] * 5),
    ]
    results = results_of([model("a")], cells)
    (axes, _) = list(pictures(results))[1].figure.axes
    numbers = {(text.get_position()): text.get_text() for text in axes.texts}
    assert numbers[0.5, 0.5] == "100"
    assert numbers[0.5, 9.5] == "0"
    assert (1.5, 0.5) not in numbers
    assert len(numbers) == 15
    bottom, top = axes.get_ylim()
    assert top < bottom
    assert axes.get_yticklabels()[0].get_text() == "0%"


@pytest.mark.parametrize(
    "asked",
    [
        {"count": 1, "seeds": 1, "lengths": (K,), "babilong": (K,), "stories": 2},
        {"count": 12, "long_names": True, "lengths": (0, 512, K), "babilong": (0, K), "stories": 2},
    ],
)
def test_few_and_many_models_and_lengths(asked, tmp_path):
    results = fake_results(**asked)
    drawn = list(pictures(results))
    files = [path for picture in drawn[:2] for path in picture.write(tmp_path)]
    assert all(path.stat().st_size > 1000 for path in files)
    write_html(results, tmp_path / "report.html", drawn=drawn[:2])
    names = [picture.name for picture in drawn]
    assert len(names) == len(set(names))
    assert {picture.of for picture in drawn if picture.name.startswith("scores")} == {""}  # of all


LONG = "Bits a byte of the same 1024 tokens of a book that nobody has read, with ever more text before"
OFFICIAL = Metric("wanted values in the answer, by the official rule", chance=0.05)
WORSE = Metric("wrong answers of all that were given", higher_is_better=False)
WORDS = Metric("perplexity of a word of the held-out articles", False, False)
SIZES = (512, 600, 700, K, 10_000_000)


def hard_results(count, metric, value, lengths=SIZES, groups=(), axis="length"):
    """Results of models with long names, under a long title; value: makes an estimate of a number."""
    models = fake_models(count, 1, long_names=True)
    cells = []
    for i, each in enumerate(models):
        if axis == "position":
            curve = [Point(end // 2, end, value(i)) for end in lengths]
            cells.append(Cell("needle", each.name, None, {"exact": value(i)}, curve=curve))
        for length in lengths if axis == "length" else [None] if axis is None else []:
            depth = [value(i + j) for j in range(10)] if axis and count < 10 else []
            cells.append(Cell("needle", each.name, length, {"exact": value(i)}, by_depth=depth))
            cells += [
                Cell("needle", each.name, length, {"exact": value(i + j)}, group=group)
                for j, group in enumerate(groups)
            ]
    return results_of(models, cells, title=LONG, metrics={"exact": metric}, axis=axis)


def hits(share):
    return lambda i: Estimate.of_hits(share(i), 10)


def about_as(number):
    return lambda i: Estimate(number(i), 0.9 * number(i), 1.1 * number(i), 10)


HARD = {
    "none right": (2, OFFICIAL, hits(lambda i: 0), (512,)),
    "all right": (9, OFFICIAL, hits(lambda i: 10)),
    "holes": (3, OFFICIAL, lambda i: Estimate.of_hits(3, 10 * (i % 2))),
    "thirty": (30, WORSE, hits(lambda i: i % 10), (512, 2 * K)),
    "large": (9, WORDS, about_as(lambda i: 12345.6 * (i + 1))),
    "wide": (4, WORDS, about_as(lambda i: 3 * 3.0**i)),
    "widest": (4, WORDS, about_as(lambda i: 1e-3 * 1000.0**i)),
    "alike": (2, WORDS, lambda i: Estimate(3.0, math.nan, math.nan, 1)),
    "close": (9, WORDS, lambda i: Estimate(3 + i / 10000, 3, 3.001, 10)),
    "below 0": (9, WORDS, about_as(lambda i: -1e5 * i), (), (), None),
    "groups": (9, WORDS, about_as(lambda i: 1e4 * i), (), [f"{LONG} {i}" for i in range(8)], None),
    "a group": (1, OFFICIAL, hits(lambda i: i), (), ["a"], None),
    "curve": (9, WORDS, about_as(lambda i: 3 + i / 10), [1 << k for k in range(4, 24)], (), "position"),
    "a point": (1, WORDS, about_as(lambda i: 3), [1000], (), "position"),
}


@pytest.mark.parametrize("asked", HARD.values(), ids=HARD)
def test_every_word_of_a_picture_can_be_read(asked):
    """Nothing is cut off at the edge, no word is printed on another, and axes have ticks."""
    drawn = list(pictures(hard_results(*asked)))
    assert drawn
    for picture in drawn:
        assert faults(picture.figure) == [], picture.name
        for axis in (picture.figure.axes[0].xaxis, picture.figure.axes[0].yaxis):
            low, high = sorted(axis.get_view_interval())
            assert any(low <= place <= high for place in axis.get_majorticklocs())


def test_marks_of_trainings_can_be_read():
    results = hard_results(6, OFFICIAL, hits(lambda i: i % 10))
    lengths = (96, 100, 104, 512, 520, 2 * K)
    results.models = [
        replace(each, training_length=length)
        for each, length in zip(results.models, lengths, strict=True)
    ]
    curves = next(iter(pictures(results))).figure
    assert faults(curves) == []
    text = " ".join(curves.axes[0].get_xlabel().split())
    assert all(f" {length} (" in text for length in ("96", "100", "104", "512", "520", "2K"))


def test_names_stand_where_lines_end_in_percent_too():
    """Also where lower is better."""
    results = hard_results(2, WORSE, hits(lambda i: 4 + 4 * (i % 2)), (512, K))
    axes = next(iter(pictures(results))).figure.axes[0]
    heights = sorted(text.xy[1] for text in axes.texts)
    assert heights == pytest.approx([(40 + 4) / 108, (80 + 4) / 108], abs=0.01)


def test_no_number_has_more_digits_than_can_be_read(tmp_path):
    """Wherever a float may come from: settings, facts of models, answers."""
    results = hard_results(2, WORDS, about_as(lambda i: 1 / 3 + i), (512, K))
    results.settings = {"held_out": 0.1 + 0.2, "phases": {"train": 1234 / 7}, "all": [1 / 3, 2 / 3]}
    about = {"loss": 2 / 3, "tokens_per_second": 1e5 / 7, "bits_per_byte": 1e-5 / 3}
    results.models = [replace(each, about=about) for each in results.models]
    record = {"index": 0, "scores": {"exact": 1 / 3}, "tokens": 900 / 7, "prompt": "x", "wanted": 1 / 3}
    record |= {"answer": [-12.123456789, True], "depth": 1 / 3}
    samples = {("needle", each.name): [record] for each in results.models}
    page, markdown, *_ = write_report(results, tmp_path, samples)
    text = re.sub("<svg.*?</svg>", "", page.read_text(), flags=re.DOTALL)
    assert "0.3, " not in text
    assert "176.286" in text
    for shown in (text, markdown.read_text()):
        assert not re.search(r"\d\.\d{7}", shown)


def test_a_sample_shows_what_answers_it(tmp_path):
    results = results_of([model("a")], [needle("a", 512, 5)])
    record = {"index": 0, "scores": {"exact": 1.0}, "tokens": 500, "prompt": "x" * 900}
    record |= {"wanted": "12345", "answer": "12345", "evidence": "… is 12345) …"}
    write_html(results, tmp_path / "report.html", {("needle", "a"): [record]})
    assert "<dt>evidence</dt><dd><pre>… is 12345) …</pre>" in (tmp_path / "report.html").read_text()


def test_nothing_at_all(tmp_path):
    (page, *_) = write_report(results_of([], []), tmp_path)
    assert "What was evaluated" in page.read_text()
    cell = Cell("needle", "a", 512, {"exact": Estimate.of_hits(0, 0)})
    write_report(results_of([model("a")], [cell]), tmp_path)


def test_names_are_moved_apart_within_the_picture():
    assert spread([0.0, 0.01, 0.9], 0.06) == pytest.approx([0.0, 0.06, 0.9])
    assert spread([0.98, 0.99, 1.0], 0.06) == pytest.approx([0.88, 0.94, 1.0])
    assert spread([0.5] * 3, 2.0) == pytest.approx([0.0, 0.5, 1.0])


class Outline(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def of(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


def test_the_page_is_accessible_and_asks_for_nothing(tmp_path):
    results = fake_results(2, 2, lengths=(K, 4 * K), babilong=(K, 2 * K), stories=2)
    write_html(results, tmp_path / "report.html", fake_samples(results))
    page = Outline((tmp_path / "report.html").read_text())
    assert page.of("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(each["role"] == "img" and each["aria-label"] for each in page.of("svg"))
    assert all(each["scope"] in ("col", "row", "rowgroup") for each in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table")) > 5
    ids = [each["id"] for _, each in page.tags if "id" in each]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            place = attributes.get(name, "#")
            assert place.startswith(("#", "data:"))
            assert not place.startswith("#") or place == "#" or place[1:] in ids
    assert not page.of("script", "link", "iframe")


def test_text_is_escaped(tmp_path):
    evil = '<script>alert("&")</script>'
    results = results_of([model(evil)], [needle(evil, 512, 5)], title=evil, about=evil, name=evil)
    results.cells = [replace(cell, task=evil) for cell in results.cells]
    results.settings = {"command": evil, evil: evil}
    record = {"index": 0, "scores": {"exact": 0.0}, "tokens": 9} | dict.fromkeys(
        ("prompt", "wanted", "answer", "group"), evil
    )
    write_html(results, tmp_path / "report.html", {(evil, evil): [record]})
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;") > 10


EVIL = (
    "$\\q$",
    "\x1b[2J\x07",
    "[x](javascript:alert(1))",
    "half\udcff",
    "[/]",
    "[bold]b",
    "a\0b",
    "x\u202ey",
    "..",
    "../../up",
)


@pytest.mark.parametrize("evil", EVIL)
def test_names_that_mean_something_elsewhere_are_shown_as_they_are(evil, tmp_path):
    models = [model(evil), model("other")]
    cells = [needle(name, length, 5) for name in (evil, "other") for length in (512, 2 * K)]
    cells += [needle(evil, 512, 5, group=evil), needle(evil, 512, 5, group="g")]
    metric = {"exact": replace(EXACT, title=evil)}
    results = results_of(models, cells, title=evil, about=evil, name=evil, metrics=metric)
    results.cells = [replace(cell, task=evil) for cell in results.cells]
    results.settings = {"command": f"everlong eval '{evil}'", evil: evil}
    record = {"index": 0, "scores": {"exact": 0.0}, "tokens": 9} | dict.fromkeys(
        ("prompt", "wanted", "answer", "group"), evil
    )
    (page, markdown, *_) = write_report(results, tmp_path / "out", {(evil, evil): [record]})
    assert {path.parent for path in tmp_path.rglob("*.*")} == {tmp_path / "out"}
    told = plain(evil)
    assert escape(told) in page.read_text()
    text = markdown.read_text()
    assert f"| {for_markdown(told)} |" in text
    assert not re.search(r"(?<!\\)\]\(javascript:", text.partition("## Command")[0])
    for written in (page.read_text(), text):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", written)
    console = Console(width=200, record=True)
    print_tables(results, console)
    assert told in console.export_text()
    drawn = list(pictures(results))
    assert drawn
    assert any(escape(told, quote=False) in picture.svg for picture in drawn)


def test_a_command_ends_in_its_fence():
    results = results_of([model("a")], [needle("a", 512, 5)])
    results.settings = {"command": "everlong eval '```\n# a title'"}
    assert "````bash\neverlong eval '```\n# a title'\n````\n" in to_markdown(results, [])


def test_numbers_of_axes_stay_formulas():
    figure, axes = new_figure()
    axes.plot([1, 2, 3], [1, 2, 3], label="$\\q$")
    axes.set_yscale("log")
    axes.set_xticks([1, 2], ["$\\q$", "b"])
    axes.legend()
    svg = svg_of(figure, "x")
    assert svg.count(r"$\q$") >= 2
    assert r">$\mathdefault" not in svg  # it stands in comments


def test_right_and_wrong_samples_are_shown(tmp_path):
    results = results_of([model("a"), model("b")], [needle("a", 512, 5)])
    records = [
        {"index": i, "scores": {"exact": hit}, "tokens": 500, "depth": 0.25, "wanted": "12345"}
        | {"answer": f"answer {i}", "prompt": "x" * 900 + f"ends {i}"}
        for i, hit in enumerate([1.0, 1.0, 0.0, 0.0])
    ]
    write_html(results, tmp_path / "report.html", {("needle", "a"): records})
    text = (tmp_path / "report.html").read_text()
    shown = re.findall(r'<li class="(\w+)">.*?sample (\d), 500 tokens, depth 25%', text)
    assert shown == [("right", "0"), ("wrong", "2")]
    assert "ends 0</pre>" in text
    assert "x" * 300 not in text
