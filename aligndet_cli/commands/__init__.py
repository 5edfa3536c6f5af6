"""The commands: thin functions around the packages that do the work, registered in `cli.py`. None imports torch."""
