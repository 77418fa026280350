"""Pruners that choose without training masks: METHODS by name. Each returns a Choice; the one fold applies it."""

from llmshearing.prune.calibration import Calibration
from llmshearing.prune.method import Choice, Method
from llmshearing.prune.methods import activation, depth, obs, random, vocabulary

_MODULES = (random, activation, obs, depth, vocabulary)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _MODULES}

__all__ = ["METHODS", "Calibration", "Choice", "Method"]
