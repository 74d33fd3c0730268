"""The page in a real browser: it opens, the console stays silent, and it fits narrow and wide windows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
from made_runs import write_run

from abmll.page.command import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser installed (one of {', '.join(NAMES)}; apt-get install chromium)"
)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
MEASURE = """<script>
document.body.dataset.found = JSON.stringify({
  over: document.documentElement.scrollWidth - window.innerWidth,
  figures: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().height),
  paper: getComputedStyle(document.body).backgroundColor,
  texts: [...document.querySelectorAll("svg text")].filter(text => {
    const own = text.getBoundingClientRect(), whole = text.closest("svg").getBoundingClientRect();
    return own.left < whole.left - 2 || own.right > whole.right + 2;
  }).map(text => text.textContent),
});
</script>"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Of two runs, one of them with a long name of a task."""
    folder = tmp_path_factory.mktemp("browser")
    return report([str(write_run(folder / name)) for name in ("one", "another")], str(folder / "report.html"))


def opened(path, tmp_path, *options: str) -> tuple[str, list[str]]:
    """The document as the browser has it, and what it said on the console."""
    own = ["--headless", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        own.append("--no-sandbox")  # it does not start as root otherwise
    command = [BROWSER, *own, *options, "--dump-dom", path.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return found.stdout, [line for line in found.stderr.splitlines() if "CONSOLE" in line]


def test_it_opens_with_all_sections_and_a_silent_console(path, tmp_path):
    document, console = opened(path, tmp_path)
    assert console == []
    for section in ("runs", "scores", "tasks", "learning", "confidence", "posterior", "cost", "configuration"):
        assert f'<section id="{section}">' in document
    assert document.count("<svg") == 7 and document.count("</section>") == 8


def test_its_policy_lets_nothing_be_loaded_or_run(path, tmp_path):
    """And the console is heard: both are complained of."""
    spoiled = tmp_path / "spoiled.html"
    added = '<img src="https://example.invalid/x.png"><script>document.title = "ran"</script>'
    spoiled.write_text(path.read_text().replace("</main>", f"{added}</main>"))
    document, console = opened(spoiled, tmp_path)
    assert len(console) >= 2 and all("Content Security Policy" in line for line in console)
    assert "<title>ran</title>" not in document


@pytest.mark.parametrize("width", [420, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window(path, tmp_path, width, scheme):
    """A copy that measures itself: no part is wider than the window, no figure is empty, no text is cut off."""
    copy = tmp_path / "measured.html"
    copy.write_text(POLICY.sub("", path.read_text()).replace("</body>", f"{MEASURE}</body>"))
    dark = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    document, _ = opened(copy, tmp_path, f"--window-size={width},900", dark)
    found = json.loads(re.search(r'data-found="([^"]*)"', document)[1].replace("&quot;", '"'))
    assert found["over"] <= 0
    assert len(found["figures"]) == 7 and min(found["figures"]) > 60
    assert found["paper"] == ("rgb(21, 24, 27)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert found["texts"] == []


def test_a_picture_of_it_is_not_blank(path, tmp_path):
    picture = tmp_path / "page.png"
    opened(path, tmp_path, "--window-size=1200,2000", f"--screenshot={picture}")
    image = pytest.importorskip("PIL.Image").open(picture)
    assert image.size == (1200, 2000) and len(image.convert("RGB").getcolors(maxcolors=2**24)) > 50
