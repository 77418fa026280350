"""How Megatron names and splits the tensors of our tables, and how its arguments say what a config says. Plain data.

`layout` is the language, `layouts` the layout of each family, `arguments` the config as Megatron's arguments. They
stand among the families since they name tensors and config keys, which nothing outside `llmshearing/families` does.
What is done with them (`llmshearing.megatron`) names none.
"""

from llmshearing.families.megatron.arguments import DECISIVE, Parallel, arguments_of, config_of_arguments, disagreements
from llmshearing.families.megatron.layout import READ_SPECS, SPECS, Layout, MegatronTensor
from llmshearing.families.megatron.layouts import LAYOUTS, layout_of

__all__ = [
    "DECISIVE",
    "LAYOUTS",
    "READ_SPECS",
    "SPECS",
    "Layout",
    "MegatronTensor",
    "Parallel",
    "arguments_of",
    "config_of_arguments",
    "disagreements",
    "layout_of",
]
