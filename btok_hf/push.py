"""Command line of `btok_hf.push`."""

import argparse
import sys

from btok_hf.hub import MESSAGE, push

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m btok_hf.push",
        description="Upload an exported repository to the Hub in one commit. The token comes from HF_TOKEN or "
        "`hf auth login`; it is no flag, because other users of the machine can see flags.",
        epilog="example: python -m btok_hf.push btok-mine org/btok-2b --private",
    )
    parser.add_argument("path", help="folder written by btok_hf.export, or btok_hf.add_tokens")
    parser.add_argument("repo_id", help="where to; created if there is none")
    parser.add_argument("--private", action="store_true", default=None, help="create, or expect, a private repository")
    parser.add_argument("--revision", help="branch to commit to; made from the main branch if there is none")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--commit_message", default=MESSAGE, help="(default: %(default)s)")
    try:
        print(push(**vars(parser.parse_args())))
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
else:
    # `import btok_hf.push` binds what it imports to that name: let it be the function, not this module.
    sys.modules[__name__] = push
