"""Run the `btok` command as a module: `python -m btok_hf`, or `accelerate launch -m btok_hf`."""

import sys

from btok_hf.cli import main

sys.exit(main())
