"""What one stage leaves in the workspace and another reads: proposals and their clusters."""
