"""Errors on the command line: one line for the user, and the traceback only on request."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# What this library raises on purpose. Their text says what is wrong without the type's name.
EXPECTED = (ImportError, OSError, RuntimeError, ValueError)

RESUME = ". Go on from the last checkpoint with --resume_from_checkpoint true"


@contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """End the process with status 1 and a line `error: …` if anything fails.

    Args:
        debug (`bool`): Do not catch errors, so that Python prints the traceback.
    """
    try:
        yield
    except argparse.ArgumentError:
        raise  # invalid arguments: the parser ends the process, with status 2
    except Exception as error:
        if debug:
            raise
        # An OSError of this library has its sentence as strerror; as a text it would begin with a number.
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
        if isinstance(error, OSError) and error.filename and str(error.filename) not in text:
            text += f": {error.filename!r}"
        if not isinstance(error, EXPECTED):
            text = f"{type(error).__name__}: {text} (`btok --debug COMMAND …` shows where)"
        sys.exit(f"error: {text or type(error).__name__}")


def take_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """Words of a command line without a bare `--debug`, and whether there was one.

    The Trainer has an option `--debug VALUE` of its own, which is left.
    """
    rest, debug = [], False
    for word, following in zip(words, [*words[1:], "--"]):
        bare = word == "--debug" and following.startswith("--")
        debug |= bare
        rest += [] if bare else [word]
    return rest, debug
