"""Results as one HTML file that needs nothing else: pictures and style are in it, no script is.

Its Content-Security-Policy makes a browser refuse whatever it would have to ask for elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from everlong.files import write_file
from everlong.pictures import INK, PAPER
from everlong.words import plain_all

from .plots import Picture, pictures
from .results import Metric, Results, TaskInfo
from .tables import (
    Chapter,
    Table,
    anchor,
    chapters,
    facts_table,
    models_table,
    number,
    task_tables,
    title_of,
)
from .task import Record

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN_SAMPLES = 6  # of a task
SHOWN_CHARACTERS = 300  # of a prompt's end, of an answer
SHORT = 20  # rows of a table that is not cut in print
LONG = 24  # a word so long may be broken anywhere

Samples = Mapping[tuple[str, str], Sequence[Record]]
"""Scored samples by task and model."""


def write_html(
    results: Results,
    path: Path,
    samples: Samples | None = None,
    drawn: Iterable[Picture] | None = None,
) -> None:
    """Write the page. samples: a few of them are shown. drawn: the pictures, if they are there."""
    results, samples = results.plain(), plain_all(samples)
    by_place: dict[str, list[Picture]] = {}
    for picture in pictures(results) if drawn is None else drawn:
        by_place.setdefault(picture.of, []).append(picture)
    found = chapters(results)
    parts = [
        _section("models", "Models", _tables([models_table(results), *facts_table(results)])),
        *(_chapter(results, chapter, by_place, samples or {}) for chapter in found),
        _section("how", "How it was made", _how(results)),
    ]
    links = [("models", "Models"), *((_place(each.name), each.title) for each in found)]
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title_of_report(results)),
        subtitle=escape(subtitle_of_report(results)),
        contents=_contents([*links, ("how", "How it was made")]),
        body="\n".join(parts),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page)


def title_of_report(results: Results) -> str:
    """ "Evaluation of lm2 and llama"."""
    labels = list(dict.fromkeys(model.label for model in results.models))
    if len(labels) > 3:
        return f"Evaluation of {len(labels)} models"
    return f"Evaluation of {' and '.join(filter(None, [', '.join(labels[:-1]), *labels[-1:]]))}"


def subtitle_of_report(results: Results) -> str:
    """The day and the version."""
    packages = results.provenance.get("packages", {})
    facts = [str(results.provenance.get("date", ""))[:10], f"everlong {packages.get('everlong', '')}"]
    minutes = sum(cell.seconds for cell in results.cells) / 60
    if minutes:
        facts.append(f"{minutes:,.1f} minutes of reading and scoring")
    return " · ".join(filter(None, facts))


def _chapter(
    results: Results, chapter: Chapter, drawn: Mapping[str, list[Picture]], samples: Samples
) -> str:
    is_one = len(chapter.tasks) == 1 and not chapter.is_family
    parts = [_figures(drawn.get(chapter.name, [])) if not is_one else "", _tables(chapter.tables)]
    for task in chapter.tasks:
        if not is_one:
            parts.append(f'<h3 id="{_place(task.name)}-alone">{escape(task.title)}</h3>')
        parts += [
            f"<p>{escape(task.about)}</p>",
            _scoring(task),
            _figures(drawn.get(task.name, [])),
            _tables(task_tables(results, task)),
            _samples(results, task, samples),
            _settings(task),
        ]
    return _section(_place(chapter.name), chapter.title, "\n".join(filter(None, parts)))


def _section(place: str, title: str, body: str) -> str:
    head = f'<h2 id="{place}">{escape(title)}</h2>'
    return f'<section aria-labelledby="{place}">\n{head}\n{body}\n</section>'


def _contents(links: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><a href="#{place}">{escape(title)}</a></li>' for place, title in links)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _scoring(task: TaskInfo) -> str:
    titles = [title_of(metric) for metric in task.metrics.values()]
    more = f" Also: {'; '.join(titles[1:])}." if titles[1:] else ""
    return f'<p class="faint scoring">Scored by: {escape(titles[0])}.{escape(more)}</p>'


def _tables(tables: Iterable[Table]) -> str:
    return "\n".join(_table(table) for table in tables)


def _table(table: Table) -> str:
    """A table in a container of its own to scroll in, where the screen is narrower."""
    is_short = sum(len(rows) for _, rows in table.blocks) <= SHORT
    kind = "wide short" if is_short else "wide"
    lines = [
        f'<div class="{kind}" role="region" tabindex="0" aria-label="{escape(table.caption)}">',
        f"<table><caption><span>{escape(_sentence(table.caption))}</span></caption>",
        f"<thead>{_row(table.head, table.left, 'col')}</thead>",
    ]
    for name, rows in table.blocks:
        lines.append("<tbody>")
        if name:
            head = f'<th scope="rowgroup" colspan="{len(table.head)}"><span>{escape(name)}</span></th>'
            lines.append(f'<tr class="block">{head}</tr>')
        lines += [_row(row, table.left, "row") for row in rows]
        lines.append("</tbody>")
    notes = "".join(f'<p class="notes">{escape(note)}</p>' for note in table.notes)
    return "\n".join([*lines, "</table></div>", notes])


def _row(cells: Sequence[str], left: int, scope: str) -> str:
    """A row whose first cell, or every cell of a head (scope "col"), is a heading."""
    row = []
    for i, cell in enumerate(cells):
        name = "th" if scope == "col" or i == 0 else "td"
        kinds = " ".join(
            kind
            for kind, holds in (
                ("word", i < left),
                ("long", name == "td" and any(len(word) > LONG for word in cell.split())),
            )
            if holds
        )
        attributes = (f' scope="{scope}"' if name == "th" else "") + (
            f' class="{kinds}"' if kinds else ""
        )
        text = re.sub(r" (\([^()]*\))$", r" <span>\1</span>", escape(cell))  # an interval is one word
        row.append(f"<{name}{attributes}>{text}</{name}>")
    return f"<tr>{''.join(row)}</tr>"


def _figures(drawn: Iterable[Picture]) -> str:
    return "\n".join(_figure(picture) for picture in drawn)


def _figure(picture: Picture) -> str:
    """The SVG in the page's own colours, its ids unlike those of other pictures."""
    svg = picture.svg[picture.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{anchor(picture.name)}-", svg)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    about = escape(picture.about)
    width = picture.figure.get_figwidth()
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{about}" style="--width: {width:.1f}in"', 1)
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    wide = f'<div class="wide" role="group" tabindex="0" aria-label="picture">{svg}</div>'
    return f"<figure>{wide}{caption}</figure>"


def _samples(results: Results, task: TaskInfo, samples: Samples) -> str:
    """A few samples: of each model in turn the first right one and the first wrong one."""
    metric = task.metrics[task.main]
    shown = []
    for model in results.models:
        records = [each for each in samples.get((task.name, model.name), []) if "prompt" in each]
        values = [record["scores"].get(task.main) for record in records]
        for wanted in dict.fromkeys(value for value in values if value in (0.0, 1.0)):
            shown.append((model.name, records[values.index(wanted)]))
        if records and not set(values) & {0.0, 1.0}:
            shown.append((model.name, records[0]))
    items = "\n".join(_sample(name, record, task, metric) for name, record in shown[:SHOWN_SAMPLES])
    if not items:
        return ""
    title = f"Samples of {task.title}"
    return (
        f'<details><summary>{escape(title)}</summary>\n<ul class="samples">\n{items}\n</ul></details>'
    )


def _sample(model: str, record: Record, task: TaskInfo, metric: Metric) -> str:
    value = record["scores"].get(task.main)
    kind = {1.0: "right", 0.0: "wrong"}.get(value, "") if metric.is_share else ""
    verdict = kind or (f"{title_of(metric)}: {number(value, metric)}" if value is not None else "")
    facts = [f"sample {record['index']}", f"{record['tokens']:,.0f} tokens"]
    if record.get("depth") is not None:
        facts.append(f"depth {record['depth']:.0%}")
    if record.get("group") is not None:
        facts.append(str(record["group"]))
    rows = [("prompt", _end(str(record["prompt"])))]
    if record.get("evidence"):
        rows.append(("evidence", str(record["evidence"])))
    rows += [
        (name, _in_words(record[name])[:SHOWN_CHARACTERS])
        for name in ("wanted", "answer")
        if name in record
    ]
    texts = "".join(f"<dt>{name}</dt><dd><pre>{escape(text)}</pre></dd>" for name, text in rows)
    head = f"<b>{escape(verdict)}</b> {escape(model)}, {escape(', '.join(facts))}"
    return f'<li class="{kind}">{head}<dl>{texts}</dl></li>'


def _end(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"… {text[-SHOWN_CHARACTERS:]}"


def _settings(task: TaskInfo) -> str:
    return (
        f"<details><summary>Settings</summary>{_pairs(task.settings)}</details>"
        if task.settings
        else ""
    )


def _how(results: Results) -> str:
    settings = dict(results.settings)
    command = settings.pop("command", None)
    parts = [f"<h3>Command</h3><pre>{escape(str(command))}</pre>" if command else ""]
    parts.append(f"<h3>Settings</h3>{_pairs(settings)}" if settings else "")
    parts.append(f"<h3>Versions and machine</h3>{_pairs(results.provenance)}")
    return "\n".join(filter(None, parts))


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_in_words(value))}</dd>"
        for name, value in values.items()
    )
    return f"<dl>{rows}</dl>"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_words(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_in_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return "-" if value is None else str(value)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _place(name: str) -> str:
    return f"task-{anchor(name) or 'all'}"
