from aligndet_cli.evaluate.compare import compare_runs
from aligndet_cli.metrics.coco import COCO_NUMBERS


def _metrics(value, per_class, **groups):
    classes = [{"category_id": number, "name": name, "AP": ap} for number, (name, ap) in enumerate(per_class.items())]
    return {**dict.fromkeys(COCO_NUMBERS, value), "per_class": classes, **groups}


def test_delta_is_this_minus_the_other():
    comparison = compare_runs(_metrics(0.5, {"cat": 0.75, "dog": None}), _metrics(0.25, {"cat": 0.5, "dog": 0.1}))
    assert comparison["AP"] == {"this": 0.5, "other": 0.25, "delta": 0.25}
    assert comparison["per_class"]["cat"]["delta"] == 0.25
    assert comparison["per_class"]["dog"] == {"this": None, "other": 0.1, "delta": None}
    assert "voc" not in comparison


def test_groups_that_only_one_has_are_left_out():
    voc = {"AP07": 0.5, "AP12": 0.25}
    with_voc = _metrics(0.5, {}, voc=voc)
    assert "voc" not in compare_runs(with_voc, _metrics(0.5, {}))
    assert compare_runs(with_voc, with_voc)["voc"]["AP12"] == {"this": 0.25, "other": 0.25, "delta": 0.0}


def test_classes_of_one_name_are_compared_each_with_itself():
    ours, theirs = _metrics(0.5, {"cat": 0.75, "dog": 0.5}), _metrics(0.5, {"cat": 0.25, "dog": 0.5})
    for metrics in (ours, theirs):
        metrics["per_class"][1]["name"] = "cat"
    deltas = {name: entry["delta"] for name, entry in compare_runs(ours, theirs)["per_class"].items()}
    assert deltas == {"cat (id 0)": 0.5, "cat (id 1)": 0.0}
