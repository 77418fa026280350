"""How GGUF files, as llama.cpp reads them, name the tensors of our tables and say what a config says. Plain data.

`layouts` has the tensors of each family, `metadata` the config as keys of the file, `pretokenizers` the names of ways
to split text. They stand among the families since they name tensors, config keys and model types, which nothing outside
`llmshearing/families` does. What is done with them (`llmshearing.gguf`) names none.
"""

from llmshearing.families.gguf.layouts import ARCHITECTURES, Layout, layout_of, problems_of
from llmshearing.families.gguf.metadata import metadata_of, rope_factors
from llmshearing.families.gguf.pretokenizers import BYTE_MODEL, PIECE_MODEL, PRETOKENIZERS, pretokenizer_of

__all__ = [
    "ARCHITECTURES",
    "BYTE_MODEL",
    "PIECE_MODEL",
    "PRETOKENIZERS",
    "Layout",
    "layout_of",
    "metadata_of",
    "pretokenizer_of",
    "problems_of",
    "rope_factors",
]
