"""Edits of label files that once gave a traceback, two answers, or took all memory: the fuzz test tries them first."""

from helpers.mutations import Edit

EXAMPLES: dict[str, list[list[Edit]]] = {"coco": [], "voc": [], "yolo": []}
