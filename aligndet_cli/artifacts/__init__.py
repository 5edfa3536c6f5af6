"""Artifacts that one stage writes and another reads: proposals, their clusters, and the starts of runs."""
