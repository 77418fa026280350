"""An optimizer's state through the fold: what it remembers of a source's tensors, as memory of the compact model's.

    w' = f w  of the kept elements, f: gates and norm rescales that the fold multiplies in
    dL/dw = f dL/dw'            so             m' = m / f        v' = v / f^2        step' = step

m: momentum (Adam's first moment, Muon's buffer), v: Adam's second moment. This is the chain rule, exact where the
gates of the steps before were those of the fold; sampled ones scatter around them. An element with f = 0 (padding)
remembers nothing. Adam's next step is as large as before, in w' instead of w.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmshearing.config import Config
from llmshearing.families import table_for
from llmshearing.families.stored import as_stored
from llmshearing.families.table import Table
from llmshearing.fold.fold import Cut, gate_and_gather, renamed, resolve
from llmshearing.fold.selection import Selection
from llmshearing.storage import LazyTensor
from llmshearing.training.empty import parameters_on_meta
from llmshearing.training.groups import optimizer_groups

WEIGHTS = "model."
POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
"""By which power of a gradient's unit each memory goes."""
LAYOUT = ("dim", "runs", "sizes")
"""What a group of Muon's says of its matrices; the compact model's are others."""


@torch.no_grad()
def cut_moment(value: Tensor, cut: Cut, power: int) -> Tensor:
    """The kept elements of a moment of shape ``value``, in the compact tensor's unit: divided by f^power."""
    kept = gate_and_gather(value, _plain(cut))
    factor = gate_and_gather(value.new_ones(()).expand(value.shape), _product(cut)) ** power
    return torch.where(factor != 0, kept / factor, torch.zeros_like(kept)).contiguous()


def _plain(cut: Cut) -> Cut:
    """The same elements as they are."""
    stack = tuple((expert, _plain(own)) for expert, own in cut.stack)
    return Cut(tuple(part.ungated() for part in cut.parts), stack=stack)


def _product(cut: Cut) -> Cut:
    """What the kept elements are multiplied by; an offset is added, and changes no derivative."""
    return replace(cut, offset=0.0, stack=tuple((expert, _product(own)) for expert, own in cut.stack))


def fold_optimizer(
    saved: Mapping[str, Any], table: Table, selection: Selection, compact: PretrainedConfig, cfg: Config, fresh: bool
) -> tuple[dict[str, Any], list[int]]:
    """The compact run's optimizer state, and for each of its groups the number of the saved group that it continues.

    Args:
        saved: ``state`` by "model.<name>" and ``param_groups``, as in a checkpoint. table, selection: of the source.
        cfg: of the run. fresh: begin with zeros and at step 0, as an optimizer that has seen nothing.
    """
    cuts = resolve(table, selection, folding=True)
    state, source_of = {}, {}
    for name, new_name, spec, _ in renamed(table, selection):
        source_of[new_name] = name
        if spec.alias is None and (old := saved["state"].get(f"{WEIGHTS}{name}")) is not None:
            state[f"{WEIGHTS}{new_name}"] = {key: _folded(key, value, cuts[name], fresh) for key, value in old.items()}
    groups, continued = [], []
    for group, names in _groups(compact, cfg):
        first = f"{WEIGHTS}{source_of[names[0]]}" if names else None
        number = next((n for n, old in enumerate(saved["param_groups"]) if first in old["params"]), 0)
        own = {key: group[key] for key in LAYOUT if key in group}
        params = [f"{WEIGHTS}{name}" for name in names]
        groups.append({**saved["param_groups"][number], **own, "params": params})
        continued.append(number)
    return {"state": state, "param_groups": groups}, continued


def _folded(key: str, value: Any, cut: Cut, fresh: bool) -> Any:
    if key not in POWERS:
        return torch.zeros_like(value) if fresh and isinstance(value, Tensor) else value
    shape = _shape(value.shape, cut)
    make = partial(torch.zeros, shape, dtype=value.dtype) if fresh else partial(cut_moment, value, cut, POWERS[key])
    return LazyTensor(shape, value.dtype, make)


def _shape(shape: torch.Size, cut: Cut) -> tuple[int, ...]:
    if cut.stack:
        return (len(cut.stack), *_shape(shape[1:], cut.stack[0][1]))
    kept = zip(shape, cut.parts, strict=True)
    return tuple(size if part.index is None else len(part.index) for size, part in kept)


def _groups(config: PretrainedConfig, cfg: Config) -> list[tuple[dict[str, Any], list[str]]]:
    """The groups that a run of the compact model has, with the names of their parameters."""
    with parameters_on_meta():
        model = as_stored(AutoModelForCausalLM.from_config(config))
    model.tie_weights()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer_groups(model, table_for(config), None, cfg)
    return [(group, [names[id(parameter)] for parameter in group["params"]]) for group in groups]
