"""`python -m megagrow` runs the command line."""

from megagrow.cli.main import main

if __name__ == "__main__":
    main()
