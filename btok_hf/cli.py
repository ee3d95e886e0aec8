"""The `btok` command. Its subcommands are in `btok_hf/commands/`.

Exit status: 0 success · 1 an error, printed in one line (with `--debug` a traceback), or a failed dataset of
`btok mmeb` · 2 invalid arguments · 130 interrupted.

To add a subcommand, write it in a module of `btok_hf/commands/` and list it in `COMMANDS`.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version

from btok_hf.commands import corpus, evaluation, repositories, serving, training
from btok_hf.errors import RESUME, one_line_errors, take_debug

# In the order of `btok --help`.
COMMANDS = (
    repositories.add_tokens_command,
    repositories.convert_command,
    training.mine_command,
    training.train_command,
    repositories.export_command,
    repositories.verify_command,
    repositories.push_command,
    serving.serve_command,
    corpus.embed_command,
    corpus.index_command,
    corpus.search_command,
    corpus.app_command,
    evaluation.mmeb_command,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments (`Sequence[str]`, *optional*): The arguments after `btok`. Default: those of the process.

    Returns:
        `int`: The exit status, as in the module's docstring.
    """
    # OpenMP threads that wait for work would keep cores busy that others could use: on shared cores everything became
    # several times slower. OpenMP reads it when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        prog="btok",
        description="Create, train, publish, verify and evaluate embedding models with Bottleneck Tokens.",
        epilog="`btok COMMAND --help` shows the flags and an example. Flags may be written with - or _.\n"
        "Exit status: 0 success, 1 an error or a failed dataset of `btok mmeb`, 2 invalid arguments, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"btok-hf {version('btok-hf')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    words, bare_debug = take_debug(sys.argv[1:] if arguments is None else arguments)
    if next((word for word in words if not word.startswith("-")), None) != "train":
        # Accept `--num_tokens`, as in Python and in recipes, for `--num-tokens`. `btok train` reads both.
        words = [re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    options, rest = parser.parse_known_args(words)
    given = vars(options)
    run, debug = given.pop("run"), given.pop("debug") or bare_debug
    if run is training.run_train:
        given["words"] = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with one_line_errors(debug):
            outcome = run(**given)
        # `btok train` returns a function that runs the training. Errors of a long run keep their traceback.
        return (outcome() if callable(outcome) else outcome) or 0
    except argparse.ArgumentError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted" + RESUME * (run is training.run_train), file=sys.stderr)
        return 130
