"""The figures of the paper, of one's own runs: `aligndet figures`."""
