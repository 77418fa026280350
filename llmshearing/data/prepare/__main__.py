"""The command `python -m llmshearing.data.prepare`."""

import sys

from llmshearing.data.prepare.run import main

if __name__ == "__main__":
    sys.exit(main())
