"""`python -m merge_adapter` and the console script."""

from merge_adapter.cli import main

if __name__ == "__main__":
    main()
