"""The page in a real browser. Runs where a chromium is on the PATH."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixwright.report.hybrid_page import hybrid_page
from mixwright.report.markup import visible
from mixwright.report.page import explanation_page
from mixwright.report.task_page import task_page

from .hand import PIECES, TEXT, explanation
from .hand_hybrid import hybrid
from .hand_tasks import task_routing
from .test_page import HOSTILE

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH; the page was not opened in a browser")

# The page allows no script, so a wrapper's script looks into it from outside: a srcdoc frame shares its origin.
PROBE = """
const report = {};
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, window = frame.contentWindow, root = page.documentElement;
  const script = page.createElement("script");
  script.textContent = "window.ran = true";
  page.body.append(script);
  script.remove();
  const found = {ran: window.ran === true, scripts: page.scripts.length};
  found.width = root.clientWidth;
  found.scroll = root.scrollWidth;
  found.text = [...page.querySelectorAll(".text")].map(stream => {
    const copy = stream.cloneNode(true);
    copy.querySelectorAll(".tip").forEach(tip => tip.remove());
    return copy.textContent;
  });
  found.tips = [...page.querySelectorAll(".text .tok")].map(token => {
    token.focus();
    const tip = token.querySelector(".tip"), box = tip.getBoundingClientRect();
    const shown = page.activeElement === token && window.getComputedStyle(tip).display !== "none";
    return {shown, inside: box.left >= 0 && box.right <= root.clientWidth, height: box.height};
  });
  found.resting = page.activeElement.blur() || [...page.querySelectorAll(".tip")].every(
    tip => window.getComputedStyle(tip).display === "none");
  const token = page.querySelectorAll(".text .tok")[1] || page.body;
  const colour = () => window.getComputedStyle(token).backgroundColor;
  found.tree = [...page.querySelectorAll(".tree")].map(tree => {
    const [names, drawn] = ["ol", "svg"].map(part => tree.querySelector(part).getBoundingClientRect());
    return {apart: drawn.left >= names.right, rows: names.height, branches: drawn.height, room: drawn.width};
  });
  found.squares = [...page.querySelectorAll(".heat")].map(heat => {
    const ground = heat.querySelector(".ground").getBoundingClientRect(), label = heat.querySelector("use");
    const strong = heat.querySelector(".o"), box = heat.getBoundingClientRect();
    const colours = [".o", ".u", ".m"].map(kind => heat.querySelector(kind)).filter(path => path)
      .map(path => window.getComputedStyle(path).stroke);
    return {inside: box.right <= root.clientWidth, cell: ground.height / heat.querySelectorAll(".band").length,
      labelled: label.getBoundingClientRect().width > 10, colours, width: window.getComputedStyle(strong).strokeWidth};
  });
  found.views = [...page.querySelectorAll("input[name=view]")].map(view => { view.click(); return colour(); });
  found.page = window.getComputedStyle(page.body).backgroundColor;
  report[frame.id] = found;
}
document.getElementById("report").textContent = JSON.stringify(report);
"""


def opened(source: str, folder: Path, *flags: str) -> dict[str, Any]:
    """What the probe saw in a wide and in a narrow window."""
    assert BROWSER is not None
    frames = "".join(
        f'<iframe id="{name}" width="{width}" height="700" srcdoc="{html.escape(source, quote=True)}"></iframe>'
        for name, width in (("wide", 1280), ("narrow", 360))
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f'<!doctype html><meta charset="utf-8"><style>iframe{{border:0}}</style>{frames}<pre id="report"></pre>'
        f'<script>addEventListener("load", () => {{ {PROBE} }})</script>',
        encoding="utf-8",
    )
    quiet = (
        "--force-prefers-reduced-motion",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    )
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [BROWSER, "--headless", "--no-sandbox", *quiet, "--hide-scrollbars", profile, *flags, "--dump-dom"]
    result = subprocess.run([*command, wrapper.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="report">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found and found.group(1), result.stderr[-2000:]
    return json.loads(html.unescape(found.group(1)))


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return opened(explanation_page(explanation()), tmp_path_factory.mktemp("light"))


@pytest.mark.parametrize("window", ["wide", "narrow"])
def test_the_page_is_read_as_written(light: dict[str, Any], window: str) -> None:
    found = light[window]
    assert found["text"] == [visible(TEXT)]
    assert found["scripts"] == 0 and found["ran"] is False


@pytest.mark.parametrize("window", ["wide", "narrow"])
def test_tooltips_open_on_focus_inside_the_window_and_close_again(light: dict[str, Any], window: str) -> None:
    tips = light[window]["tips"]
    assert len(tips) == len(PIECES) and light[window]["resting"]
    assert all(tip["shown"] and tip["inside"] and tip["height"] > 40 for tip in tips), tips


def test_the_views_change_the_colours(light: dict[str, Any]) -> None:
    assert len(set(light["wide"]["views"])) == 3


def test_nothing_is_wider_than_a_narrow_window(light: dict[str, Any], tmp_path: Path) -> None:
    assert light["narrow"]["width"] == light["narrow"]["scroll"] == 360
    assert light["wide"]["width"] == light["wide"]["scroll"] == 1280
    hostile = opened(explanation_page(explanation(HOSTILE, tuple(HOSTILE))), tmp_path)
    for window, width in (("narrow", 360), ("wide", 1280)):
        assert hostile[window]["scroll"] == width
        assert hostile[window]["scripts"] == 0 and hostile[window]["ran"] is False
        assert hostile[window]["text"] == [visible("".join(HOSTILE)).encode("utf-8", "replace").decode("utf-8")]
        assert all(tip["inside"] for tip in hostile[window]["tips"])


def test_dark_pages_are_dark(light: dict[str, Any], tmp_path: Path) -> None:
    dark = opened(explanation_page(explanation()), tmp_path, "--blink-settings=preferredColorScheme=0")
    assert light["wide"]["page"] == "rgb(253, 253, 251)" and dark["wide"]["page"] == "rgb(23, 24, 26)"


def test_the_page_of_tasks_is_drawn_in_wide_and_narrow_windows(tmp_path: Path) -> None:
    names = [f"dataset {number // 6}, template {number % 6}" for number in range(24)]
    seen = opened(task_page(task_routing(names, experts=8, orders=2)), tmp_path)
    for window, width in (("wide", 1280), ("narrow", 360)):
        found = seen[window]
        assert found["scripts"] == 0 and found["ran"] is False and found["scroll"] == found["width"] == width
        (tree,) = found["tree"]
        assert tree["apart"] and tree["room"] > 100 and tree["rows"] == pytest.approx(tree["branches"], abs=1)
        assert len(found["squares"]) == 4 * 4
        for panel in found["squares"]:
            assert panel["inside"] and panel["labelled"] and panel["cell"] > 12, panel
            assert len(set(panel["colours"])) == len(panel["colours"]) > 1 and float(panel["width"].rstrip("px")) < 1


def test_hostile_tasks_stay_inside_a_narrow_window(tmp_path: Path) -> None:
    seen = opened(task_page(task_routing([*HOSTILE, "other"])), tmp_path)
    for window, width in (("wide", 1280), ("narrow", 360)):
        assert seen[window]["scroll"] == width
        assert seen[window]["scripts"] == 0 and seen[window]["ran"] is False


def test_the_page_of_a_hybrid_keeps_inside_its_window_whatever_the_names(tmp_path: Path) -> None:
    for names in (["neox", "mamba"], [HOSTILE[0], "W" * 80, "c"]):
        seen = opened(hybrid_page(hybrid(names)), tmp_path)
        for window, width in (("wide", 1280), ("narrow", 360)):
            assert seen[window]["scroll"] == seen[window]["width"] == width
            assert seen[window]["scripts"] == 0 and seen[window]["ran"] is False
