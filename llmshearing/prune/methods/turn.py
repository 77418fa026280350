"""The turned basis: hidden units become the directions in which the residual stream varies most.

    C = sum over the norms of E[x^ x^^T], x^ = x / rms(x)        Q = eigenvectors of C, of the largest eigenvalues first

The model computes what it did (`llmshearing.fold.turn`). Its hidden units now carry unequal energy, the first ones
most: half of them hold 88 to 95 % of what coordinates hold about half of. Any method can cut them afterwards.

`--basis output` takes, for a number of units that will be kept, those directions first from which the readers of every
norm can be predicted best (`llmshearing.prune.basis`). A key of the config says that units go by their order then.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.table import Table
from llmshearing.fold.selection import Selection
from llmshearing.fold.tie import ends_of, tying_rotation
from llmshearing.fold.turn import check_tied, check_turnable, stream_norms, turn
from llmshearing.prune.basis import norm_statistics, output_basis
from llmshearing.prune.calibration import Calibration
from llmshearing.prune.energy import norm_covariance
from llmshearing.prune.method import Choice, Method

ENERGY, OUTPUT = "energy", "output"
ORDER = "hidden_units_by_order"
"""Key of the config of a model whose first hidden units are to be kept."""


def choose(
    model: PreTrainedModel,
    table: Table,
    target: Mapping[str, Any],
    calibration: Calibration | None,
    *,
    untie: bool = False,
    tie_at: int | None = None,
    basis: str = ENERGY,
    keep: int | None = None,
    drop_layers: None = None,
) -> Choice:
    """Turn ``model`` in place; nothing is cut.

    Args:
        basis: "energy" or "output". keep: hidden units that will be kept, for "output"; None: half.
        untie: give a tied head a tensor of its own. tie_at: hidden units that will be kept; they are rotated among
            themselves so that the method ``tie`` then loses least.

    Raises:
        ShearingError: see :func:`llmshearing.fold.turn.turn`; there are fewer calibration tokens than hidden units,
            whose directions they then cannot tell; or ``tie_at`` is no number of hidden units.
    """
    check_turnable(table)
    check_tied(table, untie)
    config: dict[str, Any] = {"tie_word_embeddings": False} if any(spec.alias for spec in table.tensors) else {}
    kept = _kept(table, basis, keep)
    directions, energy = find_basis(model, table, calibration, kept, untie=untie)
    if kept is not None:
        table = table_for(model.config)
        config[ORDER] = True
    if tie_at is not None:
        directions[:, :tie_at] @= _tying(model, table, directions, tie_at)
    turn_model(model, table, directions, untie=untie)
    part = energy[: kept or len(energy) // 2].sum() / energy.sum()
    about = {"basis": basis, "energy": energy.tolist(), "energy_of_the_first_half": part.item()}
    return Choice(Selection(), about, config=config)


def find_basis(
    model: PreTrainedModel, table: Table, calibration: Calibration | None, keep: int | None, *, untie: bool = False
) -> tuple[Tensor, Tensor]:
    """(Q [d, d], energy [d] of its columns), float64.

    Args:
        keep: hidden units that the basis "output" is to be made for, for which the norms of ``model`` are absorbed in
            place (:func:`absorb`); None: the basis "energy".

    Raises:
        ShearingError: see :func:`principal_basis`.
    """
    directions, energy = principal_basis(model, table, calibration)
    if keep is None or calibration is None:
        return directions, energy
    covariance = directions @ torch.diag(energy) @ directions.T
    absorb(model, table, untie=untie)
    directions = output_basis(norm_statistics(model, table_for(model.config), calibration), covariance, keep)
    return directions, (directions * (covariance @ directions)).sum(0)


def _kept(table: Table, basis: str, keep: int | None) -> int | None:
    """Directions that the basis is made for; None: for any number."""
    size = table.axes["hidden"].length
    if basis == ENERGY:
        if keep is not None:
            raise ShearingError(f"--keep {keep} with --basis {ENERGY}: it is the same for any number; leave it out")
        return None
    kept = size // 2 if keep is None else keep
    if not 1 <= kept < size:
        raise ShearingError(f"--keep {kept}: a number of hidden units to keep, 1 to {size - 1}")
    return kept


def absorb(model: PreTrainedModel, table: Table, *, untie: bool = False) -> None:
    """Multiply the norms' weights into their readers; hidden units stay as they are."""
    turn_model(model, table, torch.eye(table.axes["hidden"].length, dtype=torch.float64), untie=untie)


def principal_basis(model: PreTrainedModel, table: Table, calibration: Calibration | None) -> tuple[Tensor, Tensor]:
    """(Q [d, d], energy [d] of its columns, falling), float64.

    Raises:
        ShearingError: no sequences, or fewer tokens than hidden units.
    """
    size = table.axes["hidden"].length
    if calibration is None:
        raise ShearingError("turning hidden units needs sequences to look at: --calibration")
    if calibration.select.numel() < size:
        raise ShearingError(
            f"{calibration.select_name} has {calibration.select.numel():,} tokens to find {size:,} directions by: give "
            f"more sequences (--samples), at least as many tokens as hidden units"
        )
    energy, basis = torch.linalg.eigh(norm_covariance(model, table, calibration))
    return basis.flip(1).contiguous(), energy.flip(0).clamp_min(0.0)


@torch.no_grad()
def _tying(model: PreTrainedModel, table: Table, basis: Tensor, width: int) -> Tensor:
    """Rotation [width, width] of the first columns of Q."""
    if not 1 <= width <= len(basis):
        raise ShearingError(f"--tie_at {width}: a number of hidden units to keep, 1 to {len(basis)}")
    embedding, norm, head = ends_of(table)
    weights = model.state_dict()
    factor = weights[norm.name].double().cpu() + norm.module.offset
    kept = basis[:, :width]
    wide, last = (weights[spec.name].double().cpu() for spec in (embedding, head))
    return tying_rotation(wide @ kept, (last * factor) @ kept)


@torch.no_grad()
def turn_model(model: PreTrainedModel, table: Table, basis: Tensor, *, untie: bool = False) -> None:
    """Turn a transformers model in place; a tied one gets a head of its own where ``untie``."""
    turned = turn({name: value.cpu() for name, value in model.state_dict().items()}, table, basis, untie=untie)
    aliases = [spec.name for spec in table.tensors if spec.alias is not None]
    if aliases:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = False
    model.load_state_dict(turned, strict=True)


def goes_by_order(model: PreTrainedModel, table: Table) -> bool:
    """Whether the first hidden units are the ones to keep, as an output basis leaves them."""
    return bool(getattr(model.config, ORDER, False)) and is_turned(model, table)


def is_turned(model: nn.Module, table: Table) -> bool:
    """Whether the norms' weights are all 1, as turning leaves them: hidden units then are directions by energy."""
    norms = stream_norms(table)
    rows = [(name, spec) for name, spec, _ in table.instances() if spec in norms]
    weights = ((model.get_parameter(name), spec.module.offset) for name, spec in rows)
    return bool(rows) and all(bool((weight + offset == 1).all()) for weight, offset in weights)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--untie", action="store_true", help="give a head that is the embedding a tensor of its own")
    parser.add_argument(
        "--basis",
        choices=(ENERGY, OUTPUT),
        default=ENERGY,
        help="directions of most energy, or those that readers are predicted best from (%(default)s)",
    )
    parser.add_argument("--keep", type=int, metavar="WIDTH", help="with --basis output: units that will be kept (half)")
    parser.add_argument(
        "--tie_at", type=int, metavar="WIDTH", help="hidden units that will be kept, for the method tie to follow"
    )


METHOD = Method(
    name="turn",
    choose=choose,
    help="turn hidden units into directions by energy; the same function, nothing is cut",
    sizes=(),
    ratio=(),
    add_options=_add_options,
)
