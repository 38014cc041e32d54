"""A report of results: as JSON, as Markdown, as pictures, as a page, and on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from everlong.files import write_file

from .page import Samples, subtitle_of_report, title_of_report, write_html
from .plots import Picture, pictures
from .results import Results
from .tables import Table, anchor, chapters, models_table, task_tables, turned

WIDE = 10_000  # characters: a line that no table fills


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
    parts = [f"# {title_of_report(results)}", subtitle_of_report(results)]
    parts += ["## Models", models_table(results).markdown()]
    for chapter in chapters(results):
        parts.append(f"## {chapter.title}")
        is_one = len(chapter.tasks) == 1 and not chapter.is_family
        if not is_one:
            parts += _links(drawn, chapter.name)
        parts += [table.markdown() for table in chapter.tables]
        for task in chapter.tasks:
            parts += [] if is_one else [f"### {task.title}"]
            parts += [task.about, *_links(drawn, task.name)]
            parts += [table.markdown() for table in task_tables(results, task)]
    command = results.settings.get("command")
    if command:
        parts += ["## Command", f"```bash\n{command}\n```"]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def print_tables(results: Results, console: Console | None = None) -> None:
    """Print the tables; of a family the one that has all its tasks."""
    console = console or Console()
    for title, table in _printed(results):
        if title:
            console.print(Text(f"\n{title}", "bold"))
        drawn = table.rich()
        free = console.options.update(width=WIDE)
        if console.measure(drawn, options=free).maximum > console.width:  # turned it is narrower
            drawn = turned(table).rich()
        console.print(drawn)
        for note in table.notes:
            console.print(Text(note), soft_wrap=True)


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
    return [f"![{picture.about}]({anchor(picture.name)}.png)" for picture in drawn if picture.of == of]
