"""Labels -> detector."""
