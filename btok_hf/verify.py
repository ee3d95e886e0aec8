"""Command line of `btok_hf.verify`."""

import argparse
import sys

from btok_hf.hub import verify

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m btok_hf.verify",
        description="Load a repository in a fresh process with stock loaders and compare it with its golden vectors.",
        epilog="example: python -m btok_hf.verify org/btok-2b --revision main",
    )
    parser.add_argument("path_or_repo", help="folder or Hub id of an exported repository")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--device", default="cpu", help="where to embed (default: %(default)s)")
    try:
        print(f"verified: largest difference {verify(**vars(parser.parse_args())):.1e}")
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
else:
    # `import btok_hf.verify` binds what it imports to that name: let it be the function, not this module.
    sys.modules[__name__] = verify
