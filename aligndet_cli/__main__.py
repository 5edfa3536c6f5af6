"""Run the command line as `python -m aligndet_cli`."""

from aligndet_cli.cli import main

if __name__ == "__main__":
    main()
