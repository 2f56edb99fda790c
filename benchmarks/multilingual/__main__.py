"""``python -m benchmarks.multilingual``; everything heavy is imported only in the process that needs it."""

import sys

if __name__ == "__main__":
    from benchmarks.multilingual.cli import main

    sys.exit(main())
