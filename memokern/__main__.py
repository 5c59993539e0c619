"""`python -m memokern`: the same as the console script `memokern`."""

from memokern.apps.cli import main

if __name__ == "__main__":
    main(prog_name="memokern")
