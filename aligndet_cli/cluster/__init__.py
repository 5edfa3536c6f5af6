"""Boxes -> pseudo classes."""
