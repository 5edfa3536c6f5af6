"""Detector -> metrics."""
