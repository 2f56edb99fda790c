"""``python -m benchmarks``; everything heavy is imported only in the process that needs it."""

import sys

from benchmarks.extras import missing_extra

if __name__ == "__main__":
    if missing := missing_extra("bench"):
        sys.exit(missing)
    from benchmarks.report.command import main

    sys.exit(main())
