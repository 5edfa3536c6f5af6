"""Artifacts that one stage writes and another reads: proposals and their clusters."""
