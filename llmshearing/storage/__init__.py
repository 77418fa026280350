"""How tensors are kept in files, without what they mean: read lazily, written one at a time, checked on the way.

`lazy` the mapping that readers, fold and writers share; `torch_file` files of torch.save, `sharded` folders of
torch.distributed.checkpoint (`metadata`: what is in one), `hub` the weights of a Hugging Face model; `write` writes.
"""

from llmshearing.files import new_file
from llmshearing.storage.archive import Archive, open_archive
from llmshearing.storage.hub import find_file, open_weights
from llmshearing.storage.lazy import LazyTensor, LazyTensors, Recent, lazily, load_weights
from llmshearing.storage.write import write_safetensors, write_torch_file, write_torch_files

__all__ = [
    "Archive",
    "LazyTensor",
    "LazyTensors",
    "Recent",
    "find_file",
    "lazily",
    "load_weights",
    "new_file",
    "open_archive",
    "open_weights",
    "write_safetensors",
    "write_torch_file",
    "write_torch_files",
]
