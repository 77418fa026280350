"""Megatron's distributed checkpoints (`torch_dist`), read without Megatron and without torch.distributed.

    .metadata, *.distcp     what torch.distributed.checkpoint writes
    common.pt               plain values of all ranks, the arguments among them

They hold the whole model, as one rank would have it, whatever the number of ranks that saved it. The layers are stacked
on a first dimension, the experts of a layer on a second one. Each layer's tensor is read as if it stood alone; only its
own pieces are read. Optimizer states in the same folder are left aside.
"""

from __future__ import annotations

from pathlib import Path

from llmshearing.errors import ShearingError
from llmshearing.megatron.shards import RECORD, Shards, iteration_folder, read_arguments, read_values
from llmshearing.storage import LazyTensor
from llmshearing.storage.metadata import METADATA, Item
from llmshearing.storage.sharded import ShardedFolder

COMMON = "common.pt"
PARTS = ("embedding", "decoder", "output_layer")  # of a model, among the optimizer's
LAYERS, EXPERTS, ONE_EXPERT = "decoder.layers.", ".experts.experts.", ".experts.local_experts.{}."


def is_stacked(path: Path | str) -> bool:
    """Whether a folder is one of Megatron's distributed checkpoints."""
    path = Path(path)
    if not path.is_dir():
        return False
    folder = iteration_folder(path)
    return (folder / COMMON).is_file() and (folder / METADATA).is_file()


def open_stacked(path: Path | str) -> Shards:
    """Read what it holds, and no tensor, as the shards of one rank.

    Raises:
        ShearingError: files are missing or damaged, or of another version of Megatron's layout.
    """
    folder = iteration_folder(path)
    common = read_values(folder / COMMON)
    arguments = read_arguments(folder / COMMON, common)
    opened = ShardedFolder(folder)
    model: dict[str, LazyTensor] = {}
    for name, item in opened.tensors().items():
        if name.partition(".")[0] in PARTS:
            model |= _unstacked(opened, name, item)
    if not model:
        raise ShearingError(f"{folder} has no tensor that is named as megatron-core names them")
    return Shards(folder, arguments, common.get(RECORD), [[model]])


def _unstacked(opened: ShardedFolder, name: str, item: Item) -> dict[str, LazyTensor]:
    """The tensors that stand stacked in one: of each layer, or of each expert of each layer."""
    rest = name.removeprefix(LAYERS)
    if rest == name or rest[:1].isdigit():
        return {name: opened.at(item)}
    layers = range(item.shape[0])
    if EXPERTS not in rest:
        return {f"{LAYERS}{layer}.{rest}": opened.at(item, layer) for layer in layers}
    return {
        f"{LAYERS}{layer}.{rest.replace(EXPERTS, ONE_EXPERT.format(expert))}": opened.at(item, layer, expert)
        for layer in layers
        for expert in range(item.shape[1])
    }
