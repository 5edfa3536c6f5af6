"""`aligndet figures`: the paper's figures, of the user's own runs."""
