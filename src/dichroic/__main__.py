"""`python -m dichroic`: the command line."""

import sys

from dichroic.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
