"""``python -m synthetic``."""

import signal
import sys

from synthetic.cli import main

if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # as Ctrl-C: a scheduler's stop leaves nothing behind either
    sys.exit(main())
