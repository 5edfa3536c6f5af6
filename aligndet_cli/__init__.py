"""AlignDet: pre-train a detector's neck and head on unsupervised boxes, fine-tune and evaluate it."""

__version__ = "0.1.0"
