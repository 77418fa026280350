"""Composer checkpoint <-> Hugging Face model; see `--help`."""

import sys

from llmshearing.checkpoints.cli import composer_to_hf

if __name__ == "__main__":
    sys.exit(composer_to_hf())
