"""Images and labels on disk -> batches."""
