"""``python -m pronghorn``: the doctor; with a command's name, that command."""

import sys

from pronghorn.cli.main import main

arguments = sys.argv[1:]
sys.exit(main(arguments if arguments and not arguments[0].startswith("-") else ["doctor", *arguments]))
