"""`aligndet predict`: a fine-tuned detector on anybody's images."""
