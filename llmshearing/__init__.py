"""Structured pruning of language models: masks choose, one fold cuts, training continues."""

__version__ = "0.1.0"
