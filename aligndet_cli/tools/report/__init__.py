"""What the runs of a workspace say together: `aligndet report`."""
