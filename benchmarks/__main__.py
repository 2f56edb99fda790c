"""``python -m benchmarks``; everything heavy is imported only in the process that needs it."""

import sys

if __name__ == "__main__":
    from benchmarks.report.command import main

    sys.exit(main())
