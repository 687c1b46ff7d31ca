"""`python -m memserve` is `memserve`."""

from memserve.cli import main

if __name__ == "__main__":
    main()
