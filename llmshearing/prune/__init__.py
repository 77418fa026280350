"""One-shot pruning: `python -m llmshearing.prune METHOD ...`, or :func:`prune` from Python."""

from llmshearing.prune.run import Pruned, prune
from llmshearing.prune.sequences import SequenceOptions

__all__ = ["Pruned", "SequenceOptions", "prune"]
