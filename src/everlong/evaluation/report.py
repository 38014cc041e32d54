"""A report of results: as JSON, as Markdown, as pictures, as a page, and on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from everlong.files import write_file

from .page import Samples, subtitle_of_report, title_of_report, write_html
from .plots import Picture, pictures
from .results import Results
from .tables import (
    Table,
    anchor,
    chapters,
    chosen,
    for_markdown,
    models_table,
    task_tables,
    turned,
)

WIDE = 10_000  # characters: a line that no table fills
NAME, HEAD = 24, 16  # characters: longer ones are folded, before a table loses columns


def write_report(results: Results, folder: Path, samples: Samples | None = None) -> list[Path]:
    """Write results.json, results.md, report.html and the pictures. samples: scored ones, by task and
    model; the page shows a few. Returns the files."""
    json, markdown, page = (folder / name for name in ("results.json", "results.md", "report.html"))
    results.write(json)
    drawn = list(pictures(results))
    files = [path for picture in drawn for path in picture.write(folder)]
    write_file(markdown, to_markdown(results, drawn))
    write_html(results, page, samples, drawn)
    return [page, markdown, json, *files]


def to_markdown(results: Results, drawn: list[Picture]) -> str:
    """The tables as Markdown, with links to the pictures in the same folder."""
    results = results.plain()
    parts = [f"# {for_markdown(title_of_report(results))}", for_markdown(subtitle_of_report(results))]
    parts += ["## Models", models_table(results).markdown()]
    for chapter in chapters(results):
        parts.append(f"## {for_markdown(chapter.title)}")
        is_one = len(chapter.tasks) == 1 and not chapter.is_family
        if not is_one:
            parts += _links(drawn, chapter.name)
        parts += [table.markdown() for table in chapter.tables]
        for task in chapter.tasks:
            parts += [] if is_one else [f"### {for_markdown(task.title)}"]
            parts += [for_markdown(task.about), *_links(drawn, task.name)]
            parts += [table.markdown() for table in task_tables(results, task)]
    command = results.settings.get("command")
    if command:
        fence = max(["```", *(f"{each}`" for each in re.findall("`+", str(command)))], key=len)
        parts += ["## Command", f"{fence}bash\n{command}\n{fence}"]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def print_tables(results: Results, console: Console | None = None) -> None:
    """Print the tables; of a family the one that has all its tasks."""
    console = console or Console()
    for title, table in _printed(results.plain()):
        if title:
            console.print(Text(f"\n{title}", "bold"))
        for part in _fitting(table, console):
            console.print(part.rich())
        for note in table.notes:
            console.print(Text(note), soft_wrap=True)


def _fitting(table: Table, console: Console) -> list[Table]:
    """The table as the terminal has room for it: as it is, turned, or with some of its columns at a
    time."""
    for whole in (table, turned(table)):
        if _width(whole, console) <= console.width:
            return [whole]
    parts, left = [], list(range(table.left, len(table.head)))
    while left:
        count = len(left)
        while count > 1 and _width(_cut(chosen(table, left[:count])), console) > console.width:
            count -= 1
        parts.append(chosen(table, left[:count]))
        left = left[count:]
    return parts


def _width(table: Table, console: Console) -> int:
    """Characters that it takes where nothing is folded."""
    return console.measure(table.rich(), options=console.options.update(width=WIDE)).maximum


def _cut(table: Table) -> Table:
    """With what may well be folded, heads and the names of rows, cut."""
    blocks = [(name, [[row[0][:NAME], *row[1:]] for row in rows]) for name, rows in table.blocks]
    return replace(table, head=[each[:HEAD] for each in table.head], blocks=blocks)


def _printed(results: Results) -> Iterator[tuple[str, Table]]:
    """Each table, with its chapter's or task's title before the first one."""
    for chapter in chapters(results):
        sources = [(chapter.title, chapter.tables)]
        if not chapter.is_family:
            sources += [(task.title, task_tables(results, task)) for task in chapter.tasks]
        for title, tables in sources:
            for i, table in enumerate(tables):
                yield ("" if i else title), table


def _links(drawn: list[Picture], of: str) -> list[str]:
    shown = [picture for picture in drawn if picture.of == of]
    return [f"![{for_markdown(each.about)}]({anchor(each.name)}.png)" for each in shown]
