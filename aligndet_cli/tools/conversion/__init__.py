"""Detector weights in the layouts of other programs: `import-weights` and `export`."""
