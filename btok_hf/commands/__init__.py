"""The subcommands of `btok`: each has a function that adds its parser and a function that runs it.

They only parse arguments and call the library. A subcommand imports what it needs when it runs, so that `--help` is
fast.
"""

import argparse
import contextlib
import textwrap
from collections.abc import Iterator
from typing import Any


def add_command(commands: Any, name: str, run: Any, description: str, example: str) -> argparse.ArgumentParser:
    """Add the parser of a subcommand. `run` is called with its parsed arguments."""
    parser = commands.add_parser(
        name,
        help=description[0].lower() + description.partition(". ")[0].rstrip(".")[1:],
        description=textwrap.fill(description, 79),
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # which leaves the example on one line
    )
    # SUPPRESS, because a default would overwrite `btok --debug COMMAND`.
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser.set_defaults(run=run)
    return parser


@contextlib.contextmanager
def needing(command: str, extra: str) -> Iterator[None]:
    """Imports of a command: a package that is not installed is named, with the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{command} needs the package {error.name}: pip install 'btok-hf[{extra}]'.") from error
