"""One-shot pruning: `python -m llmshearing.prune METHOD ...`, or :func:`prune` from Python."""

from llmshearing.prune.calibration import SequenceOptions
from llmshearing.prune.run import Pruned, prune

__all__ = ["Pruned", "SequenceOptions", "prune"]
