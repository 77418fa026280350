"""Fold the checkpoint of a pruning run; see `--help`."""

import sys

from llmshearing.checkpoints.cli import post_pruning_processing

if __name__ == "__main__":
    sys.exit(post_pruning_processing())
