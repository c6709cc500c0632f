"""``python -m synthetic``."""

import sys

from synthetic.cli import main

if __name__ == "__main__":
    sys.exit(main())
