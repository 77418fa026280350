"""Pruners that choose without training masks: METHODS by name. Each returns a Choice; the one fold applies it."""

from llmshearing.pruners.base import Choice, Method
from llmshearing.pruners.calibration import Calibration

METHODS: dict[str, Method] = {}  # filled below, a line each: METHODS[name] = module.METHOD

__all__ = ["METHODS", "Calibration", "Choice", "Method"]
