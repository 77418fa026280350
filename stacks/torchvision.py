"""Stands in for torchvision where it is not installed: Composer imports it when it is imported itself.

Composer uses it for images alone. `make install STACK=current` copies this file into its environment where no other
can be imported, as beside a CPU build of torch from another place than torchvision is. All that is asked of it is an
empty class, so that `import`, `isinstance` and names of enumerations work and nothing else does.
"""

import sys
from types import ModuleType

__version__ = "0.0"
__path__: list[str] = []
BELOW = ("datasets", "io", "models", "models.resnet", "ops", "transforms", "transforms.functional",
         "transforms.v2", "transforms.v2.functional", "utils")  # fmt: skip


class _Names(type):
    def __getattr__(cls, name: str) -> str:  # a member of an enumeration
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        kind = type if self.__name__.endswith("datasets") else _Names  # datasets are inherited from
        return kind(name, (), {"__module__": self.__name__})


for below in BELOW:
    module = _Empty(f"{__name__}.{below}")
    module.__path__ = []
    sys.modules[module.__name__] = module
    parent, _, name = module.__name__.rpartition(".")
    setattr(sys.modules[parent], name, module)
