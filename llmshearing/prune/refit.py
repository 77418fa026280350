"""Refit a cut model in closed form: each tensor learns, from the model's own activations, to say what the source says.

    front to back:  W <- W + R^T X (X^T X + ridge mean(diag X^T X) I)^-1,        R = what is wanted - what W says now

    tensor that reads the stream (queries, keys, values, gate, up)    wanted: the source's output, of the kept rows
    tensor that writes it (o, down)                                   wanted: the source's stream behind it, of the kept
                                                                      units, less the model's own stream before it
    output head                                                       W_head B, B: the source's last normed stream from
                                                                      the model's

A token of the stream counts by its relative error, as the norms that read the stream see it: where one is a hundred
times as long as the others (the first of a sequence, often), it would else be all that counts.

X is what the tensor reads in the cut model, whose earlier tensors are refitted by then. The MLP of a layer is asked for
the source's stream just before the next kept layer: it takes over the layers that are gone, and all earlier errors.
Biases, norms, embeddings and a head that is the embedding stay. Nothing is trained. The sequences that choose serve
here too, but for an eighth, on which the refitted model has to be better (docs/research/recover.md, section 4, step 7).

Shape legend: N tokens, n inputs and m outputs of a tensor, D hidden units of the source, d kept ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.names import BLOCKS
from llmshearing.families.table import Table, TensorSpec
from llmshearing.fold.fold import Cut, Part, part_of, renamed, resolve
from llmshearing.fold.selection import Selection
from llmshearing.fold.turn import HIDDEN
from llmshearing.progress import tqdm
from llmshearing.prune.calibration import Calibration, labels_of
from llmshearing.prune.methods.decoder import batch_loss, first, weight
from llmshearing.prune.methods.obs.layers import Running, hidden_states

log = logging.getLogger(__name__)

HELD_OUT = 8  # one sequence in so many judges
AGREES = 1e-3  # relative distance at which a layer adds its branches as assumed


@dataclass(frozen=True)
class Refit:
    """Loss of the cut model before and after, on sequences that it was not fitted to; ``kept``: which one it is now."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether the refitted tensors stay."""
        return self.after < self.before


@torch.no_grad()
def refit(
    source: PreTrainedModel,
    compact: PreTrainedModel,
    table: Table,
    selection: Selection,
    calibration: Calibration,
    ridge: float = 0.1,
) -> Refit:
    """Refit ``compact`` in place, where that makes it better.

    Args:
        source: the model that was cut, in float32 and eval mode. table: its own. selection: what cut it.
        calibration: ``select`` is used. ridge: of the mean square of what a tensor reads.

    Raises:
        ShearingError: there are fewer than two sequences, ``ridge`` is not above 0, or the family's layers are no chain
            of normed branches that are added to the stream.
    """
    check_refittable(table)
    if len(calibration.select) < 2:
        raise ShearingError(f"{calibration.select_name}: refitting needs at least two sequences, there is one")
    if not ridge > 0:
        raise ShearingError(f"refit_ridge = {ridge}: a number above 0 is needed, such as 0.1")
    rows = torch.arange(len(calibration.select))  # by domain
    judges = rows % HELD_OUT == min(HELD_OUT, len(rows)) - 1
    ids, mask = calibration.select, calibration.select_mask
    judge = _labelled(calibration, judges)
    if not any(weight(labels) for _, labels in judge):
        raise ShearingError(f"{calibration.select_name}: no token of the held out sequences counts; give more of them")
    data = replace(calibration, select=ids[~judges], select_mask=None if mask is None else mask[~judges])
    before = {name: value.clone() for name, value in compact.state_dict().items()}
    losses = [_loss(compact, judge)]
    _Refitting(source, compact, table, selection, data, ridge).run()
    losses.append(_loss(compact, judge))
    result = Refit(*losses)
    if not result.kept:
        log.warning("refitting made it no better (loss %.4f, before %.4f): the cut tensors stay", *losses[::-1])
        compact.load_state_dict(before, strict=True)
    else:
        log.info("refitted: loss %.4f, before %.4f, on %d sequences held out", *losses[::-1], int(judges.sum()))
    return result


def check_refittable(table: Table) -> None:
    """Refuse families whose tensors cannot be refitted by what stands in the table.

    Raises:
        ShearingError: with the reason.
    """
    if table.experts is not None:
        raise ShearingError(f"the {table.family} family cannot be refitted: which expert reads a token is chosen")
    if behind := [spec.name for spec in table.tensors if spec.module.form.endswith("norm") and spec.scaled]:
        raise ShearingError(
            f"the {table.family} family cannot be refitted: {behind[0]} stands between a branch and the stream"
        )


def _labelled(calibration: Calibration, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Batches of some rows with their labels."""
    ids, labels = calibration.select[rows], labels_of(calibration.select, calibration.select_mask)[rows]
    return [*zip(ids.split(calibration.batch_size), labels.split(calibration.batch_size), strict=True)]


def _loss(model: PreTrainedModel, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    total = sum(batch_loss(model, batch, labels) * weight(labels) for batch, labels in batches)
    return total / sum(weight(labels) for _, labels in batches)


@dataclass(frozen=True)
class _Row:
    """One tensor of a kept layer: its modules in the source and in the cut model, and what of it stays."""

    spec: TensorSpec
    theirs: nn.Module
    own: nn.Module
    cut: Cut


class _Refitting:
    """One pass from front to back. The streams of both models wait between layers."""

    def __init__(
        self,
        source: PreTrainedModel,
        compact: PreTrainedModel,
        table: Table,
        selection: Selection,
        data: Calibration,
        ridge: float,
    ) -> None:
        self.source, self.compact, self.table, self.ridge = source, compact, table, ridge
        self.kept = selection.kept_layers(table.layers)
        self.theirs = hidden_states(source, table, data, table.layers, None)
        self.own = hidden_states(compact, table_for(compact.config), data, len(self.kept), None)
        self.units = part_of(table, HIDDEN, None, selection)
        self.rows: dict[int | None, list[_Row]] = {}
        cuts = resolve(table, selection, folding=True)
        for name, new_name, spec, layer in renamed(table, selection):
            theirs, own = source.get_submodule(_path(name)), compact.get_submodule(_path(new_name))
            self.rows.setdefault(layer, []).append(_Row(spec, theirs, own, cuts[name]))

    def run(self) -> None:
        """Every layer, then the head."""
        for layer in range(self.kept[0]):
            self.theirs.advance(layer)
        ends = [following - 1 for following in (*self.kept[1:], self.table.layers)]
        for number, (layer, end) in enumerate(zip(tqdm(self.kept, "refit", unit="layer"), ends, strict=True)):
            self._readers(number, layer, BLOCKS[0])
            self._writers(number, layer, BLOCKS[0], BLOCKS[1])
            self._readers(number, layer, BLOCKS[1])
            for passed in range(layer, end + 1):
                self.theirs.advance(passed)
            self._writers(number, layer, BLOCKS[1], None)
            self.own.advance(number)
        self._head()

    def _readers(self, number: int, layer: int, block: str) -> None:
        """Tensors of a block that read the stream; all read the same."""
        rows = [row for row in self._matrices(layer, block) if row.spec.read() == HIDDEN]
        fits = {row.own: _Fit(row) for row in rows}
        for at in range(len(self.own.states.split(self.own.batch_size))):
            wanted = _seen(self.theirs, layer, at, [row.theirs for row in rows])
            seen = _seen(self.own, number, at, [row.own for row in rows])
            for row in rows:
                read, said = seen[row.own]
                aim = _part(wanted[row.theirs][1], _outputs(row))
                fits[row.own].add(read, aim - said)
        for fit in fits.values():
            fit.solve(self.ridge)

    def _writers(self, number: int, layer: int, block: str, following: str | None) -> None:
        """The tensor of a block that writes the stream. following: the block behind it; None: the layer ends."""
        [row] = [row for row in self._matrices(layer, block) if row.spec.written() == HIDDEN]
        [norm] = self._norms(layer, block)
        after = self._norms(layer, following)[0] if following else None
        fit, targets = _Fit(row), self.theirs.states.split(self.theirs.batch_size)
        for at in range(len(targets)):
            wanted = targets[at]
            if after is not None:
                wanted = _seen(self.theirs, layer, at, [after.theirs])[after.theirs][0]
            seen = _seen(self.own, number, at, [row.own, norm.own, *([after.own] if after else [])])
            # Some families join batch and tokens in a part of a layer.
            stream, (read, said) = _tokens(seen[norm.own][0]), seen[row.own]
            says = stream + _tokens(said)
            self._check(says, _tokens(seen[after.own][0] if after else seen[None][1]))
            aim = _part(_tokens(wanted).to(stream), self.units)
            fit.add(read, aim - says, aim.norm(dim=-1, keepdim=True))
        fit.solve(self.ridge)

    def _check(self, assumed: Tensor, found: Tensor) -> None:
        if (assumed - found).norm() > AGREES * found.norm():
            raise ShearingError(
                f"the {self.table.family} family cannot be refitted: its layers do not add what a branch says to the "
                "stream as it is"
            )

    def _head(self) -> None:
        """An output head of its own: the source's head on what the model's last states tell of the source's."""
        ends = self.rows[None]
        heads = [row for row in ends if _is_matrix(row) and row.spec.alias is None and row.spec.read() == HIDDEN]
        if not heads or any(row.spec.alias for row in ends):
            return
        [row], [norm] = heads, _once(row for row in ends if _is_norm(row))
        fit = _Fit(row)
        for own, theirs in zip(*(run.states.split(run.batch_size) for run in (self.own, self.theirs)), strict=True):
            read = norm.own(own.to(self.own.device))
            wanted = norm.theirs(theirs.to(self.theirs.device))
            wide = torch.zeros_like(wanted)
            index = slice(None) if self.units.index is None else self.units.index
            wide[..., index] = read
            fit.add(read, wanted - wide)
        weight = _part(row.theirs.weight, row.cut.parts[0], 0).double()  # type: ignore[arg-type]
        fit.change(weight @ fit.solution(self.ridge).to(weight.device))

    def _matrices(self, layer: int, block: str) -> list[_Row]:
        return [row for row in self.rows[layer] if row.spec.block == block and _is_matrix(row)]

    def _norms(self, layer: int, block: str) -> list[_Row]:
        """Norms of the stream before a block, by their weights."""
        return _once(row for row in self.rows[layer] if row.spec.block == block and _is_norm(row))


def _tokens(values: Tensor) -> Tensor:
    """[tokens, d], whatever stood before the last dimension."""
    return values.flatten(0, -2)


def _once(rows: Iterable[_Row]) -> list[_Row]:
    """One row a module: a norm may have a bias beside its weight."""
    return list({row.own: row for row in rows}.values())


def _path(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _is_matrix(row: _Row) -> bool:
    return row.spec.module.form in ("linear", "conv1d") and len(row.spec.axes) == 2


def _is_norm(row: _Row) -> bool:
    return row.spec.module.form.endswith("norm") and row.spec.axes == (HIDDEN,)


def _outputs(row: _Row) -> Part:
    """What of a tensor's outputs stays, with gates where the fold multiplies them in."""
    return row.cut.parts[row.spec.writes or 0]


def _part(values: Tensor, part: Part, dim: int = -1) -> Tensor:
    """The elements of a part, times their gates."""
    if part.index is None:
        return values
    chosen = values.index_select(dim, part.index.to(values.device))
    if part.gate is None:
        return chosen
    gate = part.gate.to(chosen)
    return chosen * (gate if dim == -1 else gate[:, None])


class _Fit:
    """The sums that one tensor's solution is made of: X^T X [n, n] and R^T X [m, n], float64 on the CPU."""

    def __init__(self, row: _Row) -> None:
        self.row = row
        self.square: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0

    def add(self, read: Tensor, residual: Tensor, length: Tensor | None = None) -> None:
        """read: [..., n]; residual: [..., m], what is wanted less what is said; length: [N, 1], of what is wanted."""
        x, r = _tokens(read).float(), _tokens(residual).float()
        if length is not None:
            length = length.float().clamp_min(torch.finfo(torch.float32).tiny)
            x, r = x / length, r / length
        self.square = self.square + (x.T @ x).to("cpu", torch.float64)
        self.cross = self.cross + (r.T @ x).to("cpu", torch.float64)

    def solution(self, ridge: float) -> Tensor:
        """R^T X (X^T X + ridge mean(diag) I)^-1, [m, n] float64."""
        square, cross = torch.as_tensor(self.square), torch.as_tensor(self.cross)
        mean = square.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        damped = square + ridge * mean * torch.eye(len(square), dtype=torch.float64)
        return torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped)).T

    def solve(self, ridge: float) -> None:
        """Change the tensor by its solution."""
        self.change(self.solution(ridge))

    def change(self, difference: Tensor) -> None:
        """Add [m, n] to the tensor."""
        weight: Any = self.row.own.weight
        by_rows = self.row.spec.writes == 0
        weight.copy_((weight.double() + (difference if by_rows else difference.T).to(weight.device)).to(weight.dtype))


def _seen(
    running: Running, number: int, at: int, modules: Sequence[nn.Module]
) -> Mapping[nn.Module | None, tuple[Tensor, Tensor]]:
    """(input, output) of modules inside a layer for one batch; under None those of the layer."""
    with _watching(modules) as seen:
        output = running.run(number, at)
    return {**seen, None: (running.states.split(running.batch_size)[at], output)}


@contextmanager
def _watching(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module | None, tuple[Tensor, Tensor]]]:
    seen: dict[nn.Module | None, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        seen[module] = inputs[0], first(output)

    hooks = [module.register_forward_hook(keep) for module in {*modules}]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
