"""`aligndet bench`: measure how fast this machine trains."""
