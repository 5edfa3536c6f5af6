"""What pre-training and fine-tuning share: loop, processes, checkpoints, logs."""
