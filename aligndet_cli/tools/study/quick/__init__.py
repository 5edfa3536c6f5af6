"""`aligndet study --quick`: a study that is planned for a data set, this machine and a given time."""
