"""Every Python snippet of README and docs runs, each file's in one namespace, from top to bottom."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(page):
    return SNIPPET.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in snippets(page):
        exec(compile(code, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), (
                f"{page.name} points to {target}, which is not there"
            )


def test_readme_has_snippets():
    assert len(snippets(ROOT / "README.md")) >= 2


def test_the_map_from_paper_to_code_names_what_is_there():
    page = (ROOT / "docs" / "paper_to_code.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "everlong"
    everything = "\n".join(path.read_text() for path in package.rglob("*.py"))
    rows = [row.split("|")[-2] for row in page.splitlines() if row.startswith("|")]
    found = 0
    for part in (part for row in rows for part in row.split(";")):
        file = re.search(r"`(\w+/\w+\.py)`:", part)
        code = (package / file[1]).read_text() if file else everything
        for name in re.findall(r"`(?:\w+\.)?([A-Za-z_]\w+)`", part):
            assert re.search(rf"(def|class) {name}\b", code), f"paper_to_code.md names {name}: {part}"
            found += 1
    assert found > 10
