"""Read images and labels from disk and make batches of them."""
