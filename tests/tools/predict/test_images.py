from pathlib import Path

import pytest

from aligndet_cli.errors import DataError
from aligndet_cli.tools.predict.images import find_inputs


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nothing is read here, so empty files will do."""
    for name in ("a.jpg", "b.PNG", "notes.txt", "[1].jpg", "deep/er/c.jpg", ".hidden.jpg", "out/images/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["."], ["[1].jpg", "a.jpg", "b.PNG", "deep/er/c.jpg"]),
        (["b.PNG", "a.jpg", "./a.jpg", "*.jpg"], ["b.PNG", "a.jpg", "[1].jpg"]),
        (["[1].jpg", "deep"], ["[1].jpg", "deep/er/c.jpg"]),
        (["de*"], ["c.jpg"]),
        (["**"], ["[1].jpg", "a.jpg", "b.PNG", "deep/er/c.jpg"]),
        (["notes.txt"], ["notes.txt"]),  # named outright: reading it will tell
    ],
    ids=["folder", "files and pattern", "a name that looks like a pattern", "pattern of folders", "all below", "named"],
)
def test_words_name_images(photos, monkeypatch, words, expected):
    monkeypatch.chdir(photos)
    found = find_inputs(words, leave_out=[Path("out")]).images
    assert found.file_names == expected
    assert [found.record(index).path.exists() for index in range(len(found))] == [True] * len(expected)
    assert found.image_ids.tolist() == list(range(1, len(expected) + 1))


@pytest.mark.parametrize("word", ["nowhere.jpg", "*.gif", "out", "*.txt", ""])
def test_a_word_without_images_is_named(photos, monkeypatch, word):
    monkeypatch.chdir(photos)
    with pytest.raises(DataError) as caught:
        find_inputs(["a.jpg", word], leave_out=[Path("out")])
    assert str(caught.value).startswith(f"{word}: no images there")


def test_unreadable_kinds_are_said(photos, monkeypatch, caplog):
    monkeypatch.chdir(photos)
    for name in ("d.heic", "deep/e.dng", "a.npy"):  # a.jpg is there
        (photos / name).touch()
    find_inputs(["."], leave_out=[Path("out")])
    assert "2 files are left out: .heic (1), .dng (1), first d.heic; convert them to JPEG" in caplog.text
    caplog.clear()
    find_inputs(["*"], leave_out=[Path("out")])
    assert "1 file is left out: .heic (1), first d.heic" in caplog.text and ".dng (1), first deep/e.dng" in caplog.text
    with pytest.raises(DataError, match=r"^\*\.heic: no images there; 1 file is left out"):
        find_inputs(["*.heic"], leave_out=[Path("out")])
