import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from aligndet_cli.artifacts.starts import find_starts
from aligndet_cli.tools.report import pictures
from aligndet_cli.tools.report.collect import collect_report
from aligndet_cli.tools.report.html import write_page
from aligndet_cli.tools.report.pictures import find_pictures
from aligndet_cli.workspace import Workspace
from helpers.commandline import aligndet
from helpers.pages import HOSTILE, NUM_PAIRS, make_workspace, read_page

pytestmark = pytest.mark.plots


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
    assert header[:5] == ["evaluation", "start", "AP", "AP50", "AP75"]
    assert len(rows) == 2 * NUM_PAIRS
    for name, start, *cells in rows:
        assert start == (HOSTILE if name.startswith("pretrain") else "plain")
        metrics = json.loads((workspace / "evaluate" / name / "metrics.json").read_text())
        values = [metrics.get(title) for title in header[2:]]
        assert cells == ["–" if value is None else f"{100 * value:.1f}" for value in values]
    classes = [rows for caption, rows in tables.items() if caption.startswith("AP and AP50 of each class")]
    # The last evaluation: 0.4 with pre-training 0.0123 more, a third and half of it for cats.
    assert classes[-1][1:] == [[HOSTILE, "41.2", "–", "1234"], ["cat", "13.7", "20.6", "5"]]
    comparison = next(rows for caption, rows in tables.items() if caption.startswith("Evaluated runs"))
    assert comparison[0][:7] == [
        "start",
        "AP",
        "Δ\xa0AP",
        "wins",
        "runs",
        "AP50",
        "Δ\xa0AP50",
    ]  # what is equal is above
    # 10, 20, 30 and 40, and each 1.23 more; AP50 of the first pair alone.
    assert comparison[1][:7] == ["plain", "25.0 ±\xa012.9", "", "", "4", "30.0", ""]
    assert comparison[2][:7] == [HOSTILE, "26.2 ±\xa012.9", "+1.2 ±\xa00.0", "4 of 4", "4", "31.2", "+1.2"]
    [caption] = [caption for caption in tables if caption.startswith("Evaluated runs")]
    equal = "retinanet, resnet50, 90000 steps, on coco, 100 % (117266) labelled"
    assert caption.startswith(f"Evaluated runs by their start: {equal}. Numbers")


def test_begins_with_what_came_out(page):
    text = page.read_text()
    sentence = " +1.2 ± 0.0 AP over plain, 4 pairs: 95 % interval +1.2 to +1.2, ahead in 4 of 4."
    assert sentence in text and text.index(sentence) < text.index("<h1>")
    chart = text[text.index('<figure class="chart">') : text.index("</figure>")]
    # The longest error bar ends at 26.23 + 12.91; the baseline is 25 / 39.14 of it.
    assert "width: 63.87%; background: #0072B2" in chart and "width: 67.02%; background: #D55E00" in chart
    assert chart.count('class="error"') == 2 and "26.2 ± 12.9 (+1.2 ± 0.0)" in chart


def test_a_start_has_one_colour_everywhere(page, workspace):
    names = {start.label: start.colour for start in find_starts(Workspace(workspace)).values()}
    assert names == {"plain": "#0072B2", HOSTILE: "#D55E00"}
    seen = read_page(page)
    colours = [attributes["style"] for tag, attributes in seen.elements if attributes.get("class") == "swatch"]
    # Two rows, all evaluations in a table, and all fine-tunings and evaluations by themselves.
    assert len(colours) == 2 + 2 * NUM_PAIRS + 2 * 2 * NUM_PAIRS
    assert set(colours) == {f"background: {colour}" for colour in names.values()}


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
        "Embeddings of labelled objects before and after pre-training (t-SNE).",
        "Detections with and without pre-training.",
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


def test_captions_of_comparisons_name_the_starts(workspace):
    folder = Path(workspace / "evaluate" / "backbone-0-val")
    labels = {"backbone-0-val": "plain", "pretrain-0-val": "AlignDet", "pretrain-1-val": "AlignDet"}
    for name in ("compare-pretrain-0-val", "compare-pretrain-0-val-training", "own_plot"):
        (folder / "plots" / f"{name}.png").touch()
    found = {one.path.stem: one.title for one in find_pictures(Workspace(workspace), folder, "evaluate", labels)}
    for name in ("compare-pretrain-0-val", "compare-pretrain-0-val-training", "own_plot"):
        (folder / "plots" / f"{name}.png").unlink()
    assert found["compare-pretrain-0-val"] == "Precision over recall and errors: plain against AlignDet."
    assert found["compare-pretrain-0-val-training"].endswith("on the way: plain against AlignDet.")
    assert found["own_plot"] == "Own plot."


def test_plots_are_told_from_photographs(page):
    kinds = [attributes.get("class") for _, attributes in read_page(page).elements if "aria-pressed" in attributes]
    assert set(kinds) == {"picture"}  # black, red, and noise
    white = Image.new("RGB", (30, 20), "white")
    white.save(page.parent / "white.png")
    [found] = [one for one in find_pictures(Workspace(page.parent), page.parent, "") if one.path.stem == "white"]
    embedded, _ = pictures.embed_all([[found]])
    (page.parent / "white.png").unlink()
    assert embedded[found.path].is_plot


def test_says_what_does_not_fit(workspace, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pictures, "BUDGET", 30_000)
    file = write_page(Workspace(workspace), collect_report(Workspace(workspace)), tmp_path / "small.html")
    text = file.read_text()
    assert "Not embedded, for the size of this page: evaluate/backbone-0-val/plots/detections.png" in text
    assert file.stat().st_size < 200_000 and 'alt="Which errors cost' in text
    # The torn and the large picture of each evaluation.
    assert f"small.html: {2 * 2 * NUM_PAIRS} pictures did not fit into 0 MB, and are named instead: look" in caplog.text
    assert f"look at them in {workspace}, or give each study a workspace of its own (-w)" in caplog.text


def test_command_line(workspace, tmp_path):
    copy = Path(shutil.copytree(workspace, tmp_path / "w"))
    ran = aligndet("report", "--html", "-w", copy, "-o", tmp_path / "page.html", "--json")
    assert ran.json()["file"] == str(tmp_path / "page.html") and (tmp_path / "page.html").exists()
    nowhere = aligndet("report", "--html", "-w", copy, "-o", tmp_path / "none" / "page.html", code=2)
    assert nowhere.error_line().endswith("no such folder as " + str(tmp_path / "none"))
    empty = aligndet("report", "--html", "-w", tmp_path / "new", code=2)
    assert empty.error_line().endswith(": empty; start with `aligndet proposals DATA`")
