import json
import shutil
from pathlib import Path

import pytest

from aligndet_cli.tools.report import pictures
from aligndet_cli.tools.report.collect import collect_report
from aligndet_cli.tools.report.html import write_page
from aligndet_cli.workspace import Workspace
from helpers.commandline import aligndet
from helpers.pages import HOSTILE, NUM_PAIRS, make_workspace, read_page


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("page") / "<b>workspace")


@pytest.fixture(scope="module")
def page(workspace: Path) -> Path:
    return write_page(Workspace(workspace), collect_report(Workspace(workspace)))


def test_headings_and_their_order(page, workspace):
    assert page == workspace / "report.html"
    seen = read_page(page)
    assert seen.headings[0] == ("h1", "aligndet: <b>workspace")
    stages = ["proposals", "pretrain-box", "finetune", "evaluate"]
    titles = ["Results", "Artifacts", "Commands", "Figures", *stages, "Made with"]
    assert [text for level, text in seen.headings if level == "h2"] == titles
    runs = [text for level, text in seen.headings if level == "h3"]
    assert runs[:2] == ["train", "pre"] and len(runs) == 2 + 2 * 2 * NUM_PAIRS
    # Every link on the page leads to something on the page, and no name is given twice.
    ids = seen.values_of("id")
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for tag, attributes in seen.elements if tag == "a"]
    assert len(links) > 20 and {link.removeprefix("#") for link in links} <= set(ids)


def test_tables_hold_what_was_measured(page, workspace):
    tables = read_page(page).tables
    [header, *rows] = next(rows for caption, rows in tables.items() if caption.startswith("COCO numbers"))
    assert [title.rstrip() for title in header[:4]] == ["evaluation", "AP", "AP50", "AP75"]
    assert len(rows) == 2 * NUM_PAIRS
    for name, *cells in rows:
        metrics = json.loads((workspace / "evaluate" / name / "metrics.json").read_text())
        values = [metrics.get(title) for title in header[1:]]
        assert cells == ["–" if value is None else f"{100 * value:.1f}" for value in values]
    classes = [rows for caption, rows in tables.items() if caption == "Classes, in percent"]
    # The last evaluation: 0.4 with pre-training 0.0123 more, a third and half of it for cats.
    assert classes[-1][1:] == [[HOSTILE, "41.2", "–", "1234"], ["cat", "13.7", "20.6", "5"]]
    comparison = next(rows for caption, rows in tables.items() if caption.startswith("Evaluated runs"))
    assert len(comparison) == 3 and HOSTILE in comparison[2]


def test_loads_nothing_and_names_cannot_add_anything(page):
    seen = read_page(page)
    tags = [tag for tag, _ in seen.elements]
    assert tags.count("script") == 1 and not {"b", "iframe", "object", "base", "form"} & set(tags)
    addresses = [value for name in ("src", "srcset", "action", "data") for value in seen.values_of(name)]
    assert addresses and all(value.startswith("data:image/") for value in addresses)
    assert all(value.startswith(("#", "data:")) for value in seen.values_of("href"))
    assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]
    text = page.read_text()
    assert not any(word in text for word in ("@import", "url(", "http://", "https://", "fetch(", "import("))
    [policy] = [attributes["content"] for _, attributes in seen.elements if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'; img-src data:;") and "http" not in policy


def test_pictures_have_words_and_are_made_smaller(page):
    seen = read_page(page)
    images = [attributes for tag, attributes in seen.elements if tag == "img"]
    # Two figures and two readable pictures of each evaluation; figure 4 stands before figure 10.
    assert len(images) == 2 + 2 * 2 * NUM_PAIRS and all(image["alt"] for image in images)
    assert [image["alt"] for image in images[:2]] == [
        "Embeddings of labelled objects before and after pre-training (t-SNE)",
        "Detections with and without pre-training",
    ]
    kinds = {(image["width"], image["height"], image["src"].partition(";")[0]) for image in images}
    # 1500 pixels become 1400, and 240 in proportion.
    assert kinds == {
        ("30", "20", "data:image/png"),
        ("40", "30", "data:image/png"),
        ("1400", "224", "data:image/webp"),
    }
    for tag, attributes in seen.elements:
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    assert ("html", {"lang": "en"}) in seen.elements


def test_says_what_does_not_fit(workspace, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pictures, "BUDGET", 30_000)
    file = write_page(Workspace(workspace), collect_report(Workspace(workspace)), tmp_path / "small.html")
    text = file.read_text()
    assert "Not embedded, for the size of this page: evaluate/backbone-0-val/plots/detections.png" in text
    assert file.stat().st_size < 200_000 and 'alt="Which errors cost' in text
    # The torn and the large picture of each evaluation.
    assert f"small.html: {2 * 2 * NUM_PAIRS} pictures did not fit" in caplog.text


def test_command_line(workspace, tmp_path):
    copy = Path(shutil.copytree(workspace, tmp_path / "w"))
    ran = aligndet("report", "--html", "-w", copy, "-o", tmp_path / "page.html", "--json")
    assert ran.json()["file"] == str(tmp_path / "page.html") and (tmp_path / "page.html").exists()
    nowhere = aligndet("report", "--html", "-w", copy, "-o", tmp_path / "none" / "page.html", code=2)
    assert nowhere.error_line().endswith("no such folder as " + str(tmp_path / "none"))
    empty = aligndet("report", "--html", "-w", tmp_path / "new", code=2)
    assert empty.error_line().endswith(": empty; start with `aligndet proposals DATA`")
