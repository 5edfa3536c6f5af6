"""Boxes -> pre-trained neck and head."""
