"""``python -m pronghorn.cli``: the command without its installed script."""

import sys

from pronghorn.cli.main import main

sys.exit(main())
