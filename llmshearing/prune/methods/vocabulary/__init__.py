"""Vocabulary by frequency: which tokens stay, and the tokenizer that knows only them."""

from llmshearing.prune.methods.vocabulary.method import METHOD

__all__ = ["METHOD"]
