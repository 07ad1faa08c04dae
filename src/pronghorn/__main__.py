"""``python -m pronghorn``: versions, hardware, and which paths are on and why."""

import sys

from pronghorn.cli.main import main

sys.exit(main(["doctor", *sys.argv[1:]]))
