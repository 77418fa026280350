"""Runs a function when a module has been imported: now, if it is there already, else as soon as it is.

As `wrapt.when_imported` does, which takes longer to import than all of this package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Run = Callable[[ModuleType], None]


class _WhenImported:
    """A finder before all others. It finds by them, and adds a call after the module's own code."""

    def __init__(self, names: tuple[str, ...], run: Run) -> None:
        self.names, self.run = names, run

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.names:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.run(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(names: tuple[str, ...], run: Run) -> None:
    """Run `run(module)` for each of these modules once it has been imported."""
    sys.meta_path.insert(0, _WhenImported(names, run))  # type: ignore[arg-type]
    for name in names:
        if name in sys.modules:
            run(sys.modules[name])
