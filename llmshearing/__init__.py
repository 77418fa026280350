"""Structured pruning of language models: masks choose, one fold cuts, training continues.

Importing this package makes models whose layers differ in size known to transformers' Auto classes, now or as soon as
transformers is imported; it imports neither transformers nor torch itself.
"""

import sys
from types import ModuleType

from llmshearing import moved
from llmshearing.onimport import when_imported

__version__ = "0.3.0"
moved.install()


CONFIGS, MODELS = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"


def _register(module: ModuleType) -> None:
    if MODELS in sys.modules and not hasattr(sys.modules[MODELS], "MODEL_MAPPING_NAMES"):
        return  # it is being imported, and configs of transformers 5 look into it: its own turn comes
    from llmshearing.families.nonuniform.config import register

    register()


when_imported((CONFIGS, MODELS), _register)
