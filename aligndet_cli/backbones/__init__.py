"""Backbones: images -> feature maps."""
