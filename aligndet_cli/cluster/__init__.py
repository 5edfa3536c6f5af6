"""Boxes -> pseudo classes: features of every proposal, PCA, k-means."""
