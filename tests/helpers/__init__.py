"""Shared by tests, which import it by name: pytest puts `tests/` on the path (`pythonpath` in pyproject.toml).

Processes that a test spawns get that path from it, so that functions of this package can be sent to them.
"""
