import json

import pytest
from everlong.evaluation.needle import Share
from matplotlib.image import imread
from rich.console import Console

from everlong.evaluation import (
    NeedleReport,
    NeedleScore,
    plot_needle,
    print_needle_table,
    write_markdown,
    write_results,
)
from everlong.evaluation.report import _label_heights, length_name


def report(name, hits, seed=0, lengths=(512, 2048), **fields):
    scores = [
        NeedleScore(
            length=length,
            exact=Share(each, 100),
            digits=Share(5 * each, 500),
            by_depth=[Share(each // 10, 10)] * 10,
            within_reach=fields.get("near"),
            beyond_reach=fields.get("far"),
            mean_distance=length / 2,
            seconds=1.5,
            tokens_per_second=100.0,
        )
        for length, each in zip(lengths, hits, strict=True)
    ]
    return NeedleReport(name, scores, seed, training_length=512, about={"tokens": 9})


def test_results_hold_the_numbers_their_intervals_and_where_they_come_from(tmp_path):
    reports = [report("lmm", [100, 80]), report("attention", [30, 0])]
    write_results(tmp_path / "deep" / "results.json", reports, full=False)
    values = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert values["full"] is False
    assert values["provenance"]["packages"]["torch"]
    exact = values["models"][0]["scores"][1]["exact"]
    assert exact == {
        "share": 0.8,
        "low": pytest.approx(0.711, abs=1e-3),
        "high": pytest.approx(0.867, abs=1e-3),
        "samples": 100,
    }
    assert [NeedleReport.from_json(each) for each in values["models"]] == reports


def test_the_table_has_intervals_for_one_seed_and_the_spread_for_several(tmp_path):
    reports = [
        report("lmm", [100, 80], seed=0),
        report("lmm", [90, 40], seed=1),
        report("attention", [30], lengths=[512]),
    ]
    write_markdown(tmp_path / "table.md", reports)
    assert (tmp_path / "table.md").read_text() == (
        "| tokens | lmm, 2 seeds | attention |\n"
        "| ---: | ---: | ---: |\n"
        "| 512 | 95 (90-100) · 95 | 30 (22-40) · 30 |\n"
        "| 2K | 60 (40-80) · 60 | - |\n"
    )


def test_the_printed_table_says_what_lies_beyond_the_reach(tmp_path):
    far = report("attention", [30, 0], near=Share(15, 20), far=Share(1, 80))
    with (tmp_path / "out").open("w") as file:
        print_needle_table([report("lmm", [100, 80]), far], Console(file=file, width=100))
    text = (tmp_path / "out").read_text()
    assert "80 (71-87) · 80" in text
    assert "attention: 30 of 40 answers right within its attention's reach, 2 of 160 beyond it" in text


def test_the_picture_shows_every_model(tmp_path):
    reports = [report("lmm", [100, 80], seed) for seed in range(3)] + [report("other", [9, 0])]
    plot_needle(tmp_path / "needle.png", reports)
    pixels = imread(tmp_path / "needle.png")
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        seen = (abs(pixels[..., :3] * 255 - colour) < 2).all(-1)
        assert seen.sum() > 500


def test_labels_do_not_overlap():
    heights = _label_heights([(0.0, 1, "a", ""), (1.0, 1, "b", ""), (90.0, 1, "c", "")])
    assert heights == [0.0, 6.0, 90.0]


def test_length_names():
    assert [length_name(each) for each in (500, 512, 1024, 1500, 131072)] == [
        "500",
        "512",
        "1K",
        "1500",
        "128K",
    ]
