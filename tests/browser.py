"""Pages of one file as a headless Chromium shows them: on a desk and on a phone, light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
WIDTHS = (360, 1280)
# Frames of a document that is given as text may be looked into, which files may not.
_HARNESS = """<!doctype html><meta charset="utf-8">{frames}
<script>
const luminance = css => css.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) / 765;
addEventListener("load", () => {
  const told = [...document.querySelectorAll("iframe")].map(frame => {
    const inner = frame.contentDocument, root = inner.documentElement;
    const style = frame.contentWindow.getComputedStyle(inner.body);
    const figures = [...inner.querySelectorAll("figure")].filter(figure => figure.querySelector("svg"));
    return {
      width: frame.clientWidth, needed: root.scrollWidth, words: inner.body.innerText, title: inner.title,
      page: luminance(style.backgroundColor), text: luminance(style.color), ran: "ran" in frame.contentWindow,
      letters: Math.min(...[...inner.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height)),
      paths: [...inner.querySelectorAll("svg path")].filter(p => p.getTotalLength() > 0).length,
      charts: figures.map(figure => figure.querySelector("h3").innerText),
      marks: inner.querySelectorAll("svg g line").length,
      images: [...inner.images].map(i => i.naturalWidth),
      sorted: [...inner.querySelectorAll(".sortable thead th")].map(head => {
        head.click();
        return [...head.closest("table").tBodies[0].rows].map(row => row.cells[head.cellIndex].innerText);
      }),
    };
  });
  document.body.dataset.told = JSON.stringify(told);
});
</script>"""


def shown(page: bytes, folder, *, dark: bool = False) -> list[dict]:
    """What the browser makes of a page, at each of ``WIDTHS``."""
    text = page.decode()
    # It needs nothing that is not in it.
    assert not re.search(r'<[^>]*\s(src|href)="(?!data:)|url\(|@import', text)
    # Pictures are loaded where they are far below, too.
    text = text.replace(' loading="lazy"', "")
    frames = "".join(f'<iframe width="{w}" height="800" srcdoc="{escape(text)}"></iframe>' for w in WIDTHS)
    harness = folder / "harness.html"
    harness.write_text(_HARNESS.replace("{frames}", frames))
    words = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--window-size=1600,1800"),
        f"--user-data-dir={folder / 'profile'}",
        # 0 is dark.
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    command = [BROWSER, *words, "--dump-dom", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    found = re.search(r'data-told="([^"]*)"', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads(unescape(found[1]))
    for frame in told:
        # Wide tables scroll by themselves, the page does not; letters stay letters; text is seen on its ground.
        assert frame["needed"] <= frame["width"]
        assert frame["letters"] is None or frame["letters"] > 8
        assert (frame["page"] < 0.2) == dark == (frame["text"] > 0.8)
        assert not frame["ran"]
    return told
