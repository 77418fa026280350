"""Structured pruning of language models: masks choose, one fold cuts, training continues.

Importing this package makes models whose layers differ in size known to transformers' Auto classes, now or as soon as
transformers is imported; it imports neither transformers nor torch itself.
"""

from types import ModuleType

from wrapt import when_imported

from llmshearing import moved

__version__ = "0.2.0"
moved.install()


@when_imported("transformers.models.auto.configuration_auto")
def _register(module: ModuleType) -> None:
    from llmshearing.families.nonuniform.config import register

    register()
