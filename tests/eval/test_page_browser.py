"""The report page in a real browser, wide and narrow: readable, whole, and nothing beyond the window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mhconvert.eval.page import page
from tests.eval.page_sample import RECIPE, REPORTS, RESULT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FRAME = """<!doctype html><body style="margin:0"><iframe src="report.html"
  style="width:WIDTHpx;height:HEIGHTpx;border:0;display:block"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, wide = page.documentElement;
  const boxes = [...page.querySelectorAll(".box, pre")];
  document.body.dataset.facts = JSON.stringify({
    width: wide.clientWidth, scroll: wide.scrollWidth, height: wide.scrollHeight,
    outside: [...page.querySelectorAll("main > *")].filter(
      e => e.getBoundingClientRect().right > wide.clientWidth + 1).length,
    scrolling: boxes.filter(e => e.scrollWidth > e.clientWidth).length,
    heat: new Set([...page.querySelectorAll("td.heat")].map(e => getComputedStyle(e).backgroundColor)).size,
    labels: [...page.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height),
  });
};
</script></body>"""


def chromium(folder: Path, width: int, height: int, *words: str) -> str:
    """Opens `report.html` of `folder` in a frame of that size; what the browser writes on stdout."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    frame = FRAME.replace("WIDTH", str(width)).replace("HEIGHT", str(height))
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
    )
    size = f"--window-size={max(width, 500)},{height}"  # no window is narrower
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={folder / 'profile'}", size, *words, str(folder / "frame.html")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_whole(tmp_path: Path, width: int) -> None:
    """No part beyond the window, tables scrolling in their own box where it is narrow, and a picture of the page."""
    image = pytest.importorskip("PIL.Image")
    page.write(tmp_path / "report.html", RESULT, REPORTS, RECIPE)
    match = re.search(r'data-facts="([^"]*)"', chromium(tmp_path, width, 900, "--dump-dom"))
    assert match
    facts = json.loads(match.group(1).replace("&quot;", '"'))
    assert facts["width"] == width
    assert facts["scroll"] == width
    assert facts["outside"] == 0
    assert bool(facts["scrolling"]) is (width == 390)
    assert 2000 < facts["height"] < 9000
    assert facts["heat"] == 3  # all, half and nothing recalled
    assert len(facts["labels"]) > 20
    assert min(facts["labels"]) >= 9  # pixels: a plot's smallest text

    shot = tmp_path / "page.png"
    chromium(tmp_path, width, facts["height"], f"--screenshot={shot}")
    picture = image.open(shot).convert("RGB").crop((0, 0, width, facts["height"]))
    colours = picture.getcolors(maxcolors=picture.width * picture.height)
    assert len(colours) > 50
    drawn = 1 - max(colours)[0] / (picture.width * picture.height)
    assert 0.02 < drawn < 0.5
    last = picture.crop((0, picture.height - 400, width, picture.height))
    assert len(last.getcolors(maxcolors=400 * width)) > 10  # the end of the page is in it
