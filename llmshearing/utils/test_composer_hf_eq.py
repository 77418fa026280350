"""Compare a Hugging Face model with a Composer checkpoint; see `--help`."""

import sys

from llmshearing.checkpoints.cli import test_composer_hf_eq

if __name__ == "__main__":
    sys.exit(test_composer_hf_eq())
