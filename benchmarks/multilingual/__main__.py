"""``python -m benchmarks.multilingual``; everything heavy is imported only in the process that needs it."""

import sys

from benchmarks.commands import JOB, run

if __name__ == "__main__":
    sys.exit(run("python -m benchmarks.multilingual", JOB, sys.argv[1:]))
