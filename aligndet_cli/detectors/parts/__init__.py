"""Parts that two or more detector families share."""
