"""``python -m sinkpretrain`` is the console script."""

import sys

from sinkpretrain.cli import main

sys.exit(main())
