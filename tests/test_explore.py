"""The page to play with: it was made from its template, is self-contained, and works in a browser.

The browser is headless Chromium, where it is installed; explore_driver.html operates every
control of the page in it.
"""
import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
PAGE = NOTEBOOKS / "explore.html"
TEMPLATE = NOTEBOOKS / "explore.template.html"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text()


@pytest.fixture(scope="module")
def data(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def leaves(value):
    """Yield all numbers and texts in nested lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def shape_of(value):
    """What keys nested lists and dicts have; the first of a list stands for all of it."""
    if isinstance(value, dict):
        return {key: shape_of(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])]
    return type(value) is str


def test_the_page_is_its_template_with_data(page, data):
    text = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert page == TEMPLATE.read_text().replace("{ DATA }", text)


def test_it_is_small_and_needs_no_network(page):
    assert len(page.encode()) < 3e6
    without_data = TEMPLATE.read_text()
    assert not re.search(r"https?:|//cdn|@import|<link|src=\"(?!data:)", without_data)


def test_every_picture_can_be_opened(data):
    uris = [value for value in leaves(data) if str(value).startswith("data:")]
    assert len(uris) > 200
    for uri in uris:
        head, content = uri.split(",")
        assert head == "data:image/webp;base64"
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        image.load()
        assert min(image.size) >= 4


def test_its_numbers_say_what_the_text_says(data):
    rates = data["compress"]["autoencoders"]
    assert [ae["f"] for ae in rates] == sorted(ae["f"] for ae in rates)
    assert rates[0]["f"] == 1
    for ae in rates[1:]:
        bits = [point["bits"] for point in ae["points"]]
        assert bits == sorted(bits, reverse=True)           # coarser rounding needs fewer bits

    for picture in data["denoise"]["pictures"]:
        told = picture["told"]
        first = {kind: seen["error"][0] for kind, seen in told.items()}
        last = {kind: seen["error"][-1] for kind, seen in told.items()}
        assert max(first.values()) < 0.1                    # at a small t the name hardly matters
        assert last["name"] < min(last["other"], last["nothing"])

    by_scale = {point["s"]: point for point in data["guide"]["points"]}
    assert by_scale[0.0]["followed"] < 0.2 < 0.9 < by_scale[2.0]["followed"]
    assert by_scale[0.0]["varied"] > by_scale[2.0]["varied"]

    for figure in data["look"]:
        places = zip(*(sum(rows, []) for rows in figure["maps"]))
        assert max(sum(weights) for weights in places) <= 1010      # thousandths, rounded


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_every_control_changes_its_figure(page, tmp_path):
    backgrounds = set()
    for width, dark in ((1000, False), (360, True)):
        found = driven(page, width, dark, tmp_path)
        assert found["errors"] == []
        assert found["unchanged"] == []
        assert found["without_alt"] == []
        assert found["too_wide"] <= 0
        assert found["controls"] > 45
        backgrounds.add(found["background"])
    assert len(backgrounds) == 2                            # light, and dark


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("right, wrong, what", [
    ("const DATA =", "const DATES =", "errors"),
    ('input.addEventListener("input"', 'input.addEventListener("inputs"', "unchanged"),
    ("image.alt = alt;", "", "without_alt"),
    ("svg { width: 100%; max-width: 36rem;", "svg { width: 40rem;", "too_wide"),
])
def test_the_driver_finds_what_is_broken(page, tmp_path, right, wrong, what):
    assert right in page
    assert driven(page.replace(right, wrong), 360, False, tmp_path)[what]


def driven(page: str, width: int, dark: bool, folder: Path) -> dict:
    """Operate every control of a page in Chromium; return what explore_driver.html has found."""
    driver = (Path(__file__).parent / "explore_driver.html").read_text()
    text = json.dumps(page).replace("</", "<\\/")
    path = folder / "driver.html"
    path.write_text(driver.replace("{ WIDTH }", str(width)).replace("{ PAGE }", text))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000",
        f"--user-data-dir={folder / 'profile'}", "--dump-dom",
    ]
    if dark:
        command.append("--blink-settings=preferredColorScheme=0")
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result, done.stderr[-500:]
    return json.loads(html.unescape(result[1]))
