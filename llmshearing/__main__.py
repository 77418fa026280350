"""The command `python -m llmshearing`, which is `llmshearing`."""

import sys

from llmshearing.cli import main

if __name__ == "__main__":
    sys.exit(main())
