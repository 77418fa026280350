"""Optimal brain surgery on whole heads and intermediate units, layer by layer (SlimGPT, arXiv 2412.18110).

The projections out of attention (O) and out of the MLP (D) read the units to choose from:

    for each layer, on what the pruned layers before it write:
        O:  H = 2 X X^T of its inputs -> heads go one at a time (grouped queries: by the table's head kind)
        D:  H of its inputs behind the pruned attention -> units go in groups that shrink
        the weights that stay make up for what went; removed columns become 0

The model's weights are changed in place; the selection has gates 0 or 1, and the one fold cuts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmshearing.errors import ShearingError
from llmshearing.families.names import ATTENTION, BLOCKS, WIDTHS
from llmshearing.families.table import Kind, Table, TensorSpec
from llmshearing.fold.selection import Selection, Units
from llmshearing.progress import tqdm
from llmshearing.prune.calibration import Calibration
from llmshearing.prune.method import Choice, Method
from llmshearing.prune.methods.obs.layers import hidden_states
from llmshearing.prune.methods.obs.linalg import damped_inverse, remove_units
from llmshearing.prune.methods.obs.plan import STRATEGIES, UNIFORM, check_options, layer_counts
from llmshearing.prune.targets import Size, rows_to_cut

# Sizes of the first and of the last groups of intermediate units.
LARGEST, SMALLEST = 1024, 8


@dataclass(frozen=True)
class Projection:
    """A tensor whose inputs are pruned. width: inputs of a unit."""

    spec: TensorSpec
    kind: Kind
    width: int

    def name(self, layer: int) -> str:
        return self.spec.name.format(layer=layer)

    def module(self, model: nn.Module, layer: int) -> nn.Module:
        return model.get_submodule(self.name(layer).rpartition(".")[0])

    def matrix(self, model: nn.Module, layer: int) -> Tensor:
        """The weight as [out, in], which is a view of it."""
        weight = model.get_parameter(self.name(layer))
        return weight if self.spec.reads == 1 else weight.t()

    def inputs(self, model: nn.Module, layer: int) -> int:
        """How many numbers it reads."""
        return self.matrix(model, layer).shape[1]


def projections(table: Table) -> list[Projection]:
    """The projections whose inputs are pruned, in the order of the blocks. Each layer chooses its own units."""
    found = []
    for spec in sorted(table.tensors, key=lambda spec: BLOCKS.index(spec.block) if spec.block else -1):
        read = spec.read()
        if not isinstance(read, str) or read not in spec.gates or not spec.counted:
            continue
        axis = table.axes[read]
        if axis.of_expert:
            raise ShearingError(f"obs does not prune the units of experts ({spec.name}): take another method")
        if axis.kind is not None and table.kinds[axis.kind].rows is not None:
            found.append(Projection(spec, table.kinds[axis.kind], axis.per_unit))
    return found


@torch.no_grad()
def choose(
    model: PreTrainedModel,
    table: Table,
    target: Mapping[str, Size],
    calibration: Calibration | None,
    *,
    percdamp: float = 0.01,
    minlayer: int = 0,
    maxlayer: int | None = None,
    ratios: str = UNIFORM,
    min_ratio: float | None = None,
    offload: Path | str | None = None,
) -> Choice:
    """Remove heads and intermediate units and move the weights that stay; changes ``model``.

    Args:
        percdamp: added to the Hessian's diagonal, in parts of its mean. minlayer, maxlayer: the layers from minlayer to
            maxlayer - 1 are pruned. Over these, each kind loses the target's ratio in the mean.
        ratios: "uniform" or "log_increase". min_ratio: of the first layer (see `plan`).
        offload: a directory. The inputs of a layer and of its projections, for all sequences, wait there in temporary
            files. None: they wait in memory.

    Raises:
        ShearingError: options or target do not fit, or a Hessian is singular. The message names layer and tensor.
    """
    if calibration is None:
        raise ShearingError("obs needs calibration sequences")
    maxlayer = table.layers if maxlayer is None else maxlayer
    check_options(table.layers, minlayer, maxlayer, ratios, min_ratio, percdamp)
    counts = _counts(table, target, range(minlayer, maxlayer), ratios, min_ratio)
    kept: dict[str, dict[int, Tensor]] = {kind: {} for kind in counts}
    running = hidden_states(model, table, calibration, maxlayer, offload)
    for number in tqdm(range(maxlayer), desc="OBS", unit="layer"):
        for projection in projections(table.at_layer(number)):
            if remove := counts.get(projection.kind.name, {}).get(number, 0):
                hessian = running.hessian(
                    number,
                    projection.module(model, number),
                    projection.inputs(model, number),
                    attention=projection.spec.block == ATTENTION,
                )
                kept[projection.kind.name][number] = _prune(projection, number, model, hessian, remove, percdamp)
        if number + 1 < maxlayer:
            running.advance(number)
    units = {kind: tuple(_units(table, kind, number, kept[kind]) for number in range(table.layers)) for kind in counts}
    removed = {kind: [by_layer.get(number, 0) for number in range(table.layers)] for kind, by_layer in counts.items()}
    return Choice(Selection(units), {"percdamp": percdamp, "ratios": ratios, "removed": removed})


def _counts(
    table: Table, target: Mapping[str, Size], layers: Sequence[int], strategy: str, min_ratio: float | None
) -> dict[str, dict[int, int]]:
    """kind -> layer -> units to remove from each row. Kinds that the target leaves whole are absent.

    Raises:
        ShearingError: the target cuts something else; or ratios rise with depth, and the layers differ in size already.
    """
    other = [key for key, size in target.items() if key not in table.widths and size != table.shape()[key]]
    if other:
        raise ShearingError(f"obs cannot change {', '.join(other)}: prune these by another method before or after")
    counts = {}
    for name, rows in rows_to_cut(table, target).items():
        asked = [(rows[layer][0].size, rows[layer][0].size - rows[layer][1]) for layer in layers]
        if len(set(asked)) == 1:
            of_layer = layer_counts(strategy, *asked[0], len(layers), min_ratio)
        elif strategy == UNIFORM:
            of_layer = [remove for _, remove in asked]
        else:
            raise ShearingError(f"ratios {strategy} need layers of one size and one target; {name}: {asked}")
        counts[name] = dict(zip(layers, of_layer, strict=True))
    return counts


def _units(table: Table, name: str, layer: int, kept: Mapping[int, Tensor]) -> Units:
    kind = table.at_layer(layer).kinds[name]
    return Units(kept.get(layer, torch.arange(kind.size * (kind.rows or 1))).cpu())


def _prune(
    projection: Projection, layer: int, model: nn.Module, hessian: Tensor, remove: int, percdamp: float
) -> Tensor:
    """Kept units of one tensor, whose weight is changed."""
    own = projection.matrix(model, layer)
    groups = {"largest": LARGEST, "smallest": SMALLEST} if projection.width == 1 else {}
    try:
        inverse = damped_inverse(hessian, percdamp)
        kept, weight = remove_units(
            own.to(hessian), inverse, remove, width=projection.width, rows=projection.kind.rows or 1,
            **groups,
        )  # fmt: skip
    except ShearingError as error:
        raise ShearingError(f"layer {layer}, {projection.name(layer)}: {error}") from error
    own.copy_(weight)
    return kept


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--percdamp", type=float, default=0.01, help="damping, in parts of the mean diagonal (0.01)")
    parser.add_argument("--minlayer", type=int, default=0, help="first layer to prune (0)")
    parser.add_argument("--maxlayer", type=int, help="layer before which pruning stops (all)")
    parser.add_argument(
        "--ratios", choices=STRATEGIES, default=UNIFORM, help="of layers: the same, or more in later ones"
    )
    parser.add_argument("--min_ratio", type=float, help="log_increase: ratio of the first layer (5/16 of the mean)")
    parser.add_argument(
        "--offload",
        type=Path,
        metavar="DIR",
        help="keep activations, 4 (2 hidden + intermediate) bytes a token, in temporary files in DIR, not in memory",
    )


METHOD = Method(
    name="obs",
    choose=choose,
    help="least error after compensation, layer by layer (SlimGPT); changes the weights that stay",
    sizes=WIDTHS,
    add_options=_add_options,
)
