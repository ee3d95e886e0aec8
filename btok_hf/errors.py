"""Errors of users at the command line: one line, and the traceback only where it is asked for."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """End the process with status 1 and a line `error: …` where input, packages, the disk or the Hub are at fault.

    Args:
        debug (`bool`): Let the error through, so that Python shows where it was raised.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if debug:
            raise
        # An error's text may be empty, or span lines (a table of differences is printed before).
        sys.exit(f"error: {str(error) or type(error).__name__}")
