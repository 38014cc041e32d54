"""The report's page, opened by Chromium: Debian's package `chromium`."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest
from fake_results import K, fake_results, fake_samples

from everlong.evaluation.page import write_html

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE = 375

# Opens the page in a frame as wide as a phone, and says what it measured there.
WRAPPER = """<!DOCTYPE html><title>measured</title>
<iframe width="{width}" height="800" style="border: 0" srcdoc="{page}"></iframe>
<pre id="measured"></pre>
<script>
document.querySelector("iframe").addEventListener("load", (event) => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const all = (selector) => [...page.querySelectorAll(selector)];
  const box = (element) => element.getBoundingClientRect();
  const wide = all("table").map((table) => table.parentElement)
    .find((each) => each.scrollWidth > each.clientWidth + 50);
  wide.scrollLeft = 50;
  document.getElementById("measured").textContent = JSON.stringify({{
    width: root.clientWidth,
    scrolls: root.scrollWidth,
    moved: box(wide.querySelector("tbody th")).left - box(wide).left,
    tables: all("table").length,
    pictures: all("svg[role=img]").map((svg) => box(svg).width),
    cells: all("td").map((cell) => cell.textContent),
    fonts: all("td, p, li, caption").map((each) => parseFloat(getComputedStyle(each).fontSize)),
  }});
}});
</script>
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """browser(file, *options) -> (what it printed, what it complained of)."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        reason = (
            f"there is no browser: install Debian's package chromium (looked for {', '.join(NAMES)})"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    profile = tmp_path_factory.mktemp("profile")

    def run(path, *options):
        command = [
            program,
            "--headless",
            "--no-sandbox",  # root has none; what is opened is our own
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            *options,
            path.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        return done.stdout, re.findall(r"^.*CONSOLE.*$", done.stderr, re.MULTILINE)

    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    results = fake_results(babilong=(K, 8 * K))
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_html(results, path, fake_samples(results))
    return path


def measured(browser, page, width=PHONE):
    text = page.read_text().replace(
        "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"
    )
    wrapper = page.with_name("wrapper.html")
    wrapper.write_text(WRAPPER.format(width=width, page=html.escape(text)))
    printed, complaints = browser(wrapper, "--dump-dom", "--virtual-time-budget=20000")
    found = re.search(r'<pre id="measured">(.+?)</pre>', printed, re.DOTALL)
    assert found, printed[-2000:]
    assert not complaints
    return json.loads(html.unescape(found[1]))


def test_a_phone_shows_all_without_scrolling_the_page(browser, page):
    seen = measured(browser, page)
    assert seen["scrolls"] <= seen["width"] <= PHONE
    assert abs(seen["moved"]) < 1  # the models' names stay where the table scrolls
    assert seen["tables"] == 14
    assert len(seen["pictures"]) == 12
    assert min(seen["pictures"]) > 300
    assert min(seen["fonts"]) >= 12
    assert "100 (96-100)" in seen["cells"]


def test_the_page_itself_complains_of_nothing(browser, page):
    printed, complaints = browser(page, "--dump-dom")
    assert not complaints
    assert printed.count("<table>") == 14


def test_the_check_would_see_complaints_and_overflow(browser, page, tmp_path):
    text = page.read_text()
    wide = tmp_path / "report.html"
    wide.write_text(text.replace("<main>", '<main><p style="width: 600px">wide</p>'))
    assert measured(browser, wide)["scrolls"] >= 600
    wide.write_text(text.replace("<main>", '<main><img src="https://example.invalid/a.png">'))
    assert browser(wide, "--dump-dom")[1]


def test_it_prints(browser, page):
    file = page.with_name("report.pdf")
    browser(page, f"--print-to-pdf={file}", "--no-pdf-header-footer")
    written = file.read_bytes()
    assert written.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", written))
    assert 5 <= pages <= 25
    a4 = re.findall(rb"/MediaBox\s*\[0 0 (\d+)[\d.]* (\d+)", written)
    assert (
        set(a4) == {(b"594", b"841")} or set(a4) == {(b"595", b"841")} or set(a4) == {(b"595", b"842")}
    )
