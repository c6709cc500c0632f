"""``python -m synthetic``."""

import signal
import sys

from synthetic.cli import main

if __name__ == "__main__":
    # as Ctrl-C: a scheduler's stop leaves nothing behind either
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
