"""Errors of pydantic as lines for people, which name settings by their dotted path and where they come from."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from aligndet_cli.errors import did_you_mean


def readable(error: ValidationError, config_class: type[BaseModel], origins: Mapping[str, str]) -> str:
    """Return all errors in one line. Pydantic reports a union once per member type; these become one error."""
    items_by_path: dict[str, list[Any]] = {}
    for item in error.errors():
        items_by_path.setdefault(_path_of(item, config_class), []).append(item)
    lines = []
    for path, items in items_by_path.items():
        if any(other != path and _is_within(other, path) for other in items_by_path):
            continue  # a list is "too short" because of the bad entries that have lines of their own
        origin = next((origins[key] for key in origins if _is_within(key, path) or _is_within(path, key)), None)
        where = f" (from {origin})" if origin else ""
        if len(items) == 1:
            lines.append(_readable_line(path, items[0], where, config_class))
        else:
            expected = ", or ".join(dict.fromkeys(item["msg"].removeprefix("Input should be ") for item in items))
            lines.append(f"{path}: should be {expected}, got {items[0]['input']!r}{where}")
    return "; ".join(lines)


def _is_within(path: str, group: str) -> bool:
    return path == group or path.startswith(f"{group}.")


def _readable_line(path: str, item: Any, where: str, config_class: type[BaseModel]) -> str:
    if item["type"] == "extra_forbidden":
        *parents, key = map(str, item["loc"])
        return f"{path}: unknown key{where}{did_you_mean(key, list(fields_at(config_class, parents)))}"
    if item["type"] == "literal_error":
        choices = [choice.strip(" '") for choice in item["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{path}: {item['input']!r} is not a choice{where}{did_you_mean(str(item['input']), choices)}"
    if item["type"] == "union_tag_invalid":
        choices = [choice.strip(" '") for choice in item["ctx"]["expected_tags"].split(",")]
        tag, key = item["ctx"]["tag"], item["ctx"]["discriminator"].strip("'")
        return f"{path}.{key}: '{tag}' is not a choice{where}{did_you_mean(tag, choices)}"
    if item["type"] in ("model_type", "model_attributes_type"):
        return f"{path}: is a group of settings, set them one by one as {path}.KEY, got {item['input']!r}{where}"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if item["type"] in ("tuple_type", "list_type"):
        message = "should be a list, written as [1, 2]"
    if item["type"] == "missing" and str(item["loc"][-1]).isdigit():  # of a list of fixed length
        message = "has no value; the list is too short"
    if item["type"] == "less_than_equal" and isinstance(bound := item["ctx"]["le"], float):
        message = f"should be less than or equal to {bound:g}"  # some releases of pydantic write 30 zeros
    is_group = isinstance(item["input"], Mapping | BaseModel)
    if item["type"] == "value_error" and is_group:  # settings that do not go together
        return f"{path}: {message}{where}" if path else message
    return f"{path or config_class.__name__}: {message}, got {item['input']!r}{where}"


def _path_of(item: Any, config_class: type[BaseModel]) -> str:
    """Return the dotted path of the setting in error, without pydantic's names for members of unions."""
    location = [str(part) for part in item["loc"]]
    kept = [
        part
        for place, part in enumerate(location)
        if part in fields_at(config_class, location[:place]) or part.isdigit()
    ]
    if item["type"] == "extra_forbidden":
        kept.append(location[-1])
    return ".".join(kept)


def fields_at(model: type[BaseModel], location: list[str]) -> dict[str, Any]:
    """Return the fields of the settings group at `location` below `model`.

    Members of a union are merged, unless the location names one by its tag (the family of a detector).
    """
    groups = [model]
    for part in location:
        annotations = [group.model_fields[part].annotation for group in groups if part in group.model_fields]
        if annotations:
            groups = [member for annotation in annotations for member in _model_members(annotation)]
        elif any(_has_tag(group, part) for group in groups):
            groups = [group for group in groups if _has_tag(group, part)]
    return {name: field for group in groups for name, field in group.model_fields.items()}


def _has_tag(group: type[BaseModel], tag: str) -> bool:
    """Return True if one of the group's settings can only be `tag`."""
    return any(get_args(field.annotation) == (tag,) for field in group.model_fields.values())


def _model_members(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings groups that an annotation such as `A | B | None` allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _model_members(part)]
