"""What two or more detector families share."""
