"""How fast this machine trains: `aligndet bench`."""
