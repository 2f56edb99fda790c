"""``python -m benchmarks``; everything heavy is imported only in the process that needs it."""

import sys

from benchmarks.commands import MEASUREMENTS, run

if __name__ == "__main__":
    sys.exit(run("python -m benchmarks", MEASUREMENTS, sys.argv[1:]))
