"""Unlabelled images -> boxes."""
