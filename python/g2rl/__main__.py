"""``python -m g2rl``, and ``torchrun ... -m g2rl``: the command line."""

import sys

from g2rl.cli import main

if __name__ == "__main__":
    sys.exit(main())
