"""Reads pages back as what a browser would show, and makes workspaces that are worth one."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.reports import Tuned, add_evaluated, add_pretrained, put

_EMPTY = {"meta", "link", "img", "input"}
HOSTILE = """<script>alert("x")</script>' onerror="alert(1)" & {{ 7 * 7 }} été"""
NUM_PAIRS = 4
LONG = "from-scratch" + 3 * "_with_a_long_name_without_spaces"


@dataclass
class Seen:
    """What a page holds.

    Attributes:
        headings: (level, text).
        tables: rows of texts by caption, the header first.
        elements: (tag, attributes), all of them.
    """

    headings: list[tuple[str, str]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)

    def values_of(self, name: str) -> list[str | None]:
        """An attribute of all elements that have it."""
        return [attributes[name] for _, attributes in self.elements if name in attributes]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.open, self.text = Seen(), [], ""
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.elements.append((tag, dict(attrs)))
        if tag not in _EMPTY:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3", "caption", "th", "td", "code"):
            self.text = ""
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        self.text += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"
        text = self.text.strip()
        if tag in ("h1", "h2", "h3"):
            self.seen.headings.append((tag, text))
        elif tag == "caption":
            self.seen.tables[text] = self.rows
        elif tag in ("th", "td"):
            self.rows[-1].append(text)
        elif tag == "code":
            self.seen.codes.append(text)


def read_page(file: Path) -> Seen:
    """Parse a page, whose tags must all be closed."""
    reader = _Reader()
    reader.feed(file.read_text())
    reader.close()
    assert reader.open == []
    return reader.seen


def make_workspace(root: Path) -> Path:
    """Four pairs of evaluated runs of two starts, one of a hostile name, with pictures and classes."""
    put(
        root / "proposals" / "train",
        "boxes",
        {"data": {"root": "/data/a b"}},
        {},
        {"images": 8, "proposals": 99, "proposals_per_image": 12.4},
    )
    add_pretrained(root, "pre", content_hash="pre")
    for place in range(NUM_PAIRS):
        for init, label in (("backbone", "plain"), ("pretrain", HOSTILE)):
            run = Tuned(f"{init}-{place}", init, label, seed=place, weights="pre" if init == "pretrain" else "imagenet")
            value = 0.1 * (place + 1) + 0.0123 * (init == "pretrain")
            add_evaluated(root, run, value, None if place else value + 0.2)
            _add_pictures_and_classes(root / "evaluate" / f"{run.name}-val", value)
    (root / "figures").mkdir()
    for name in ("figure_10.png", "figure_4.png"):
        Image.new("RGB", (30, 20)).save(root / "figures" / name)
    return root


def make_large_study(root: Path) -> Path:
    """Three detectors, two amounts of labels and four starts of long names, some of which the paper has."""
    add_pretrained(root, "pre", content_hash="pre")
    longer = "AlignDet, contrast only, three times as long"
    starts = (("backbone", "backbone only"), ("pretrain", "AlignDet"), ("pretrain", longer), ("scratch", LONG))
    for detector, backbone in (("retinanet", "resnet50"), ("faster-rcnn", "swin-small"), ("fcos", "mobilenet-v2")):
        for fraction, steps in ((1.0, 12_000), (100.0, 90_000)):
            for place, (init, label) in enumerate(starts):
                value = 0.2 + fraction / 1000 + 0.01 * place
                setting = {"fraction": fraction, "steps": steps, "images": int(117_266 * fraction / 100)}
                for seed in range(2):
                    name = f"{detector}-{place}-{fraction:g}-s{seed}"
                    weights = "pre" if init == "pretrain" else "imagenet"
                    run = Tuned(name, init, label, detector, backbone, weights=weights, seed=seed, **setting)
                    add_evaluated(root, run, value + 0.01 * seed, value + 0.2, value - 0.05)
    return root


def _add_pictures_and_classes(folder: Path, value: float) -> None:
    file = folder / "metrics.json"
    classes = [
        {"category_id": 1, "name": HOSTILE, "AP": value, "AP50": None, "ground_truths": 1234},
        {"category_id": 2, "name": "cat", "AP": value / 3, "AP50": value / 2, "ground_truths": 5},
    ]
    file.write_text(json.dumps({**json.loads(file.read_text()), "per_class": classes}))
    (folder / "plots").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (240, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise // 8).save(folder / "plots" / "detections.png")
    Image.new("RGB", (40, 30), "red").save(folder / "plots" / "errors.png")
    (folder / "plots" / "torn.png").write_bytes(b"\x89PNG")
