"""`python -m btok_hf` is the command `btok`; so is `accelerate launch -m btok_hf`."""

import sys

from btok_hf.cli import main

sys.exit(main())
