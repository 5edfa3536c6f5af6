"""The training loop and its recipes, settings, checkpoints and logs, for all stages that train."""
