"""The page in a real browser."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aligndet_cli.tools.report.collect import collect_report
from aligndet_cli.tools.report.html import write_page
from aligndet_cli.workspace import Workspace
from helpers.pages import LONG, NUM_PAIRS, make_large_study, make_workspace

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.plots,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]
PHONE, PRINT = 390, 703  # pixels; the latter is A4 within its margins


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = Workspace(make_workspace(tmp_path_factory.mktemp("browser") / "workspace"))
    return write_page(workspace, collect_report(workspace))


@pytest.fixture(scope="module")
def large_page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = Workspace(make_large_study(tmp_path_factory.mktemp("large") / "workspace"))
    return write_page(workspace, collect_report(workspace, baseline=LONG))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Chromium refuses its sandbox to root, as which containers run.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_fits_a_phone_and_loads_nothing_from_elsewhere(browser: Any, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": PHONE, "height": 850})
    page.set_default_timeout(10_000)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri(), wait_until="load")
    page.locator("details").nth(-2).evaluate("details => { details.open = true; }")
    for image in page.locator("img:visible").all():
        image.scroll_into_view_if_needed()
        page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE  # wide tables scroll in their own frames
    page.close()
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]


@pytest.mark.parametrize(
    ("width", "scheme", "media"),
    [(1280, "light", "screen"), (PHONE, "light", "screen"), (1280, "dark", "screen"), (PRINT, "light", "print")],
    ids=["desk", "phone", "dark", "print"],
)
@pytest.mark.parametrize("which", ["page_file", "large_page_file"])
def test_no_table_is_wider_than_its_frame(
    browser: Any, which: str, width: int, scheme: str, media: str, request: pytest.FixtureRequest
) -> None:
    page_file = request.getfixturevalue(which)
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(10_000)
    page.goto(page_file.as_uri())
    page.emulate_media(media=media)
    page.locator("details").evaluate_all("all => all.forEach(details => { details.open = true; })")
    frames = page.locator(".scroll, .chart")
    sizes = frames.evaluate_all("all => all.map(frame => [frame.scrollWidth, frame.clientWidth])")
    # The chart and three tables, and one of the classes of each evaluation.
    assert len(sizes) == 4 + (2 * NUM_PAIRS if which == "page_file" else 0)
    assert [size for size in sizes if size[0] > size[1]] == []
    cells = page.locator("main :is(td, th), .bar span")  # nothing sticks out of the page, and no text is cut off
    ends = cells.evaluate_all("all => all.map(cell => cell.getBoundingClientRect().right)")
    assert len(ends) > 100 and max(ends) <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="pdftotext is not installed")
def test_a_table_that_goes_on_on_the_next_page_has_its_head_there(
    browser: Any, page_file: Path, tmp_path: Path
) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    page.close()
    words = ("pdftotext", "-layout", tmp_path / "page.pdf", "-")
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    sheets = [sheet for sheet in text.split("\f") if re.search(r"^[a-z-]+/\S+ +complete", sheet, re.MULTILINE)]
    assert sheets and [sheet for sheet in sheets if not re.search("artifact +state +result +made from", sheet)] == []


def test_dark_pages_do_not_glare(browser: Any, page_file: Path, tmp_path: Path) -> None:
    shares = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(page_file.as_uri())
        page.screenshot(path=tmp_path / f"{scheme}.png")
        page.close()
        with Image.open(tmp_path / f"{scheme}.png") as image:
            shares[scheme] = (np.asarray(image.convert("L")) > 200).mean()
    assert shares["light"] > 0.8 and shares["dark"] < 0.1


def test_a_picture_of_the_page_shows_its_pictures(browser: Any, page_file: Path) -> None:
    """A screenshot is taken as soon as a page is loaded: a picture that is decoded later would be blank there."""
    page = browser.new_page(viewport={"width": 1200, "height": 850})
    page.goto(page_file.as_uri(), wait_until="load")
    decoding = page.locator("img").evaluate_all("images => images.map(image => image.decoding)")
    assert decoding and set(decoding) <= {"auto", "sync"}


def test_tables_sort_and_filter_and_commands_copy(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.set_default_timeout(10_000)
    page.goto(page_file.as_uri())

    def column(place: int) -> list[str]:
        rows = page.locator("#measured tbody tr:visible")
        return [rows.nth(row).locator("th, td").nth(place).inner_text() for row in range(rows.count())]

    heads = page.locator("#measured thead button")
    heads.nth(2).click()
    # 0.1, 0.2, 0.3 and 0.4 without, and each 0.0123 more with pre-training; the largest first.
    falling = ["41.2", "40.0", "31.2", "30.0", "21.2", "20.0", "11.2", "10.0"]
    assert column(2) == falling
    heads.nth(2).click()
    assert column(2) == falling[::-1]
    heads.nth(3).click()  # two values and six that were not measured
    assert column(3)[:2] == ["31.2", "30.0"] and set(column(3)[2:]) == {"–"}
    heads.nth(0).click()
    names = [f"{start}-{place}-val" for start in ("backbone", "pretrain") for place in range(NUM_PAIRS)]
    assert column(0) == names
    assert page.locator("#measured th").nth(0).get_attribute("aria-sort") == "ascending"
    page.get_by_label("Filter").nth(0).fill("PRE n-2")
    assert column(0) == ["pretrain-2-val"]
    page.get_by_label("Filter").nth(0).fill("")
    assert len(column(0)) == 2 * NUM_PAIRS
    page.locator("#measured a").nth(0).click()  # opens what is folded
    page.locator("#run-evaluate-backbone-0-val[open]").wait_for(
        state="attached"
    )  # the browser tells of the click later
    page.locator("#run-evaluate-backbone-0-val .picture").nth(0).click()
    assert page.locator("figure.large").count() == 1
    page.locator(".copy").nth(0).click()
    page.locator(".copy").filter(has_text="Copied").wait_for()  # the clipboard answers when it likes
    page.close()
