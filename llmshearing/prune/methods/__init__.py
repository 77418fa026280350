"""Pruners that choose without training masks: METHODS by name. Each returns a Choice; the one fold applies it."""

from llmshearing.prune.calibration import Calibration
from llmshearing.prune.method import Choice, Method
from llmshearing.prune.methods import activation, depth, fisher, obs, random, tie, turn, vocabulary

_MODULES = (random, activation, fisher, obs, depth, vocabulary, turn, tie)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _MODULES}

__all__ = ["METHODS", "Calibration", "Choice", "Method"]
