"""Errors on the command line: one line for the user, and the traceback only on request."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """End the process with status 1 and a line `error: …` for errors of input, packages, disk and Hub.

    Args:
        debug (`bool`): Do not catch errors, so that Python prints the traceback.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if debug:
            raise
        # Some errors have no text.
        sys.exit(f"error: {str(error) or type(error).__name__}")
