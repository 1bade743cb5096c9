"""``python -m sapper.cli``: the command line where no script is installed."""

from sapper.cli import main

if __name__ == "__main__":
    main()
