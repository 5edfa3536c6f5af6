"""Labels of classes: unique, on one line, and the names themselves wherever these are good enough."""

import itertools

import pytest

from aligndet_cli.data.dataset import Category, class_labels, one_line, report_equal_names
from aligndet_cli.data.findings import Findings

ODD = ("", " ", "N/A", "cat", "cat (id 1)", "cat (id 2)", "a\nb", "a\\nb", "\ud800", "background")


def test_good_names_are_their_own_labels() -> None:
    names = dict(enumerate(("cat", "traffic light", "猫", "N/A", "a/b", "$x$", "<b>", "it's", "_x", "[red]")))
    assert class_labels(names) == names


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cat", "cat", "dog"], ["cat (id 0)", "cat (id 1)", "dog"]),
        (["", " ", "\t"], ["''", "' '", "'\\t'"]),
        (["two\nlines", "two\\nlines"], ["two\\nlines (id 0)", "two\\nlines (id 1)"]),
        (["cat", "cat", "cat (id 1)"], ["cat (id 0)", "cat (id 1)", "cat (id 1) (id 2)"]),
    ],
)
def test_labels_worked_out_by_hand(names: list[str], labels: list[str]) -> None:
    assert list(class_labels(dict(enumerate(names))).values()) == labels


def test_any_three_odd_names_have_labels_of_their_own() -> None:
    for names in itertools.product(ODD, repeat=3):
        labels = class_labels(dict(enumerate(names)), taken=("background",)).values()
        assert len({*labels, "background"}) == 4
        assert all(label.strip() and label.isprintable() and label.encode() for label in labels)


def test_what_cannot_be_shown_is_escaped() -> None:
    assert one_line("a\tb\r\n\x00\u2028\ud800") == r"a\tb\r\n\x00\u2028\ud800"
    joined = "می\u200cخواهم"  # a joiner is a part of the word
    assert one_line(joined) == joined


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({3: "cat", 5: "cat"}, "classes 3 and 5 are both called 'cat': they are learned and counted apart"),
        ({0: "cat", 1: "cat", 7: "dog", 9: "cat"}, "classes 0, 1 and 9 are all called 'cat': "),
        ({0: "a", 1: "b\n", 2: "a", 3: "b\n"}, "classes 0 and 2 are both called 'a' (and 1 more such names): "),
    ],
)
def test_equal_names_are_one_warning(names: dict[int, str], said: str) -> None:
    findings = Findings(is_strict=True)
    report_equal_names([Category(number, name) for number, name in names.items()], findings)
    (item,) = findings.items
    assert (item.severity, item.code) == ("warning", "equal-class-names") and item.message.startswith(said)
    report_equal_names([Category(1, "cat"), Category(2, "Cat")], findings)
    assert len(findings.items) == 1
