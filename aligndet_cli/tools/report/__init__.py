"""`aligndet report`: compare the runs of a workspace."""
