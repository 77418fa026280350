"""Pruners that choose without training masks: METHODS by name. Each returns a Choice; the one fold applies it."""

from llmshearing.pruners import activation, depth, obs, random, vocabulary
from llmshearing.pruners.base import Choice, Method
from llmshearing.pruners.calibration import Calibration

_MODULES = (random, activation, obs, depth, vocabulary)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _MODULES}

__all__ = ["METHODS", "Calibration", "Choice", "Method"]
