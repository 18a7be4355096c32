"""``python -m octomoe``."""

from octomoe.cli import main

if __name__ == "__main__":
    main()
