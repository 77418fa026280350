"""Optimal brain surgery on heads and intermediate units (SlimGPT)."""

from llmshearing.prune.methods.obs.method import METHOD

__all__ = ["METHOD"]
