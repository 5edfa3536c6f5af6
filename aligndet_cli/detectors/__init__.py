"""Detector families, one file each."""
