"""Importance from forward passes only (Minitron, arXiv 2407.14679): width first, then depth in the narrower model.

    channel    sqrt(sum over sequences of (mean over tokens of |a|)^2)
    heads      a = inputs of the projection out of attention; L2 over the unit's channels (of a KV group's heads, or of
               one query head of a group)
    MLP units  a = inputs of the projection out of the MLP
    hidden     a = outputs of every norm, scores summed over the norms
    layers     block influence, measured with the width already cut

Which tensors these are is read from the table. Shape legend: B sequences, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmshearing.errors import ShearingError
from llmshearing.families.table import Table
from llmshearing.fold.selection import Selection, layer_gates
from llmshearing.progress import tqdm
from llmshearing.prune.balance import add_tp, check_balance, keep_balanced
from llmshearing.prune.calibration import Calibration
from llmshearing.prune.method import ALL_SIZES, Choice, Method
from llmshearing.prune.methods.depth import block_influence, drop_least, narrowed
from llmshearing.prune.targets import rows_to_cut


def choose(
    model: PreTrainedModel,
    table: Table,
    target: Mapping[str, Any],
    calibration: Calibration | None,
    *,
    tp: int = 1,
    drop_layers: Sequence[int] | None = None,
) -> Choice:
    """Keep the most important units of each row. tp: see :mod:`llmshearing.prune.balance`.

    Raises:
        ShearingError: there is no calibration, or experts or their units are to be cut.
    """
    if calibration is None:
        raise ShearingError("activation importance needs sequences to look at: --calibration")
    cut = rows_to_cut(table, target)
    if unseen := [kind for kind in cut if kind not in {name for name, *_ in watched(table)}]:
        raise ShearingError(
            f"activation does not score {', '.join(unseen)} of a mixture of experts, each of which sees tokens of its "
            "own: take another method"
        )
    check_balance(table, cut, tp)
    scores = importance(model, table, calibration)
    units = {
        name: tuple(
            keep_balanced(table, score, kind, number, tp)
            for score, (kind, number) in zip(scores[name], rows, strict=True)
        )
        for name, rows in cut.items()
    }
    about: dict[str, Any] = {"scores": {name: [score.tolist() for score in scores[name]] for name in cut}}
    if drop_layers is None and target[table.layers_key] < table.layers:
        with narrowed(model, table, Selection(units)):
            influence = block_influence(model, calibration)
        drop_layers = drop_least(influence, table.layers - target[table.layers_key])
        about["block_influence"] = influence.tolist()
    return Choice(Selection(units, layer_gates(table.layers, drop_layers)), about)


def importance(model: PreTrainedModel, table: Table, calibration: Calibration) -> dict[str, list[Tensor]]:
    """kind -> score [n] of its units in each layer (once, for units that all layers share), float64 on the CPU."""
    squares: dict[tuple[str, int | None, str], Tensor] = {}  # (kind, layer, module) -> sum of squares [C]
    hooks = [
        hook
        for kind, layer, path, reads in watched(table)
        for hook in [_watch(model.get_submodule(path), squares, (kind, layer, path), reads, calibration)]
    ]
    try:
        with torch.no_grad():
            for batch in tqdm([*calibration.batches()], desc="activations", unit="batch"):
                model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return _scores(table, squares)


def watched(table: Table) -> list[tuple[str, int | None, str, bool]]:
    """(kind, layer, path of a module, whether its input is meant or its output) of every activation that is scored."""
    found = []
    for name, spec, layer in table.instances():
        path, read = name.rpartition(".")[0], spec.read()
        if spec.alias is not None or not name.endswith(".weight"):
            continue
        if read is None and spec.module.form.endswith("norm") and spec.axes == ("hidden",):
            found.append(("hidden", layer, path, False))  # a norm of the residual stream
        elif isinstance(read, str) and read in spec.gates:
            kind = table.kinds[table.axes[read].kind or ""]
            if kind.rows is not None and not table.axes[read].of_expert:
                found.append((kind.name, layer, path, True))
    return found


def _watch(
    module: nn.Module,
    squares: dict[Any, Tensor],
    key: tuple[str, int | None, str],
    reads: bool,
    calibration: Calibration,
) -> Any:
    tokens = calibration.select.shape[1]

    def add(activation: Tensor) -> None:  # [B, T, C]; some families join batch and tokens
        activation = activation.unflatten(0, (-1, tokens)) if activation.dim() == 2 else activation
        square = activation.abs().mean(1, dtype=torch.float64).square().sum(0).cpu()
        squares[key] = squares[key] + square if key in squares else square

    before: Callable[..., None] = lambda module, inputs: add(inputs[0])  # noqa: E731
    after: Callable[..., None] = lambda module, inputs, output: add(output)  # noqa: E731
    return module.register_forward_pre_hook(before) if reads else module.register_forward_hook(after)


def _scores(table: Table, squares: Mapping[tuple[str, int | None, str], Tensor]) -> dict[str, list[Tensor]]:
    scores: dict[str, list[Tensor]] = {}
    for (name, layer, _), square in sorted(squares.items(), key=lambda item: item[0][1] or 0):
        kind = table.at_layer(layer).kinds[name]
        if kind.rows is not None:
            scores.setdefault(name, []).append(square.view(kind.rows * kind.size, -1).sum(-1).sqrt())
        else:
            scores[name] = [scores[name][0] + square.sqrt() if name in scores else square.sqrt()]
    return scores


METHOD = Method(
    name="activation",
    choose=choose,
    help="most active units (Minitron), width before depth",
    sizes=ALL_SIZES,
    add_options=add_tp,
)
