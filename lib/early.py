"""Imported first by each script: Ctrl-C in the seconds that the other imports take ends it in one
line, too. lib/cli.py takes over from there. Imported by anything else, it does nothing."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def leave(number, frame):
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def is_script() -> bool:
    """Whether what Python runs is one of this repository's commands."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and Path(file).resolve().parent in (ROOT, ROOT / "tools")


# where SIGINT is ignored, as in the background of some shells, it stays so
if is_script() and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
