"""The masks of one model: log alphas, multipliers, gates, penalty, and the selection they make.

Shape legend: L layers; ``log_alpha`` of a kind is [N] (hidden), [L] (layer, head_layer, mlp) or [L, rows * N]. Always
float32 in training, whatever the precision of the model. ``energy`` is [norms, d]: what norms count of hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmshearing.errors import ShearingError
from llmshearing.families.names import BLOCK_MASKS as BLOCK_KINDS
from llmshearing.families.table import EXPERT, Dimension, Table, axes_of
from llmshearing.fold.fold import check_foldable, folded_shape
from llmshearing.fold.selection import Selection, Units
from llmshearing.fold.turn import HIDDEN, stream_norms
from llmshearing.masks import hard_concrete, lagrangian
from llmshearing.masks.exact import shifted

# Multipliers of the variant that has one target for all.
TOTAL = "total"
# Start just inside the clamp range: a sample is then fully open with probability 0.95.
INITIAL_MEAN, INITIAL_STD = 4.5, 0.01
# How expected sparsity is kept: a penalty pulls it, or log alpha is shifted after every step (`masks.exact`).
LAGRANGIAN, EXACT = "lagrangian", "exact"


class L0Masks(nn.Module):
    """Hard concrete masks for some kinds of units of a table.

    Args:
        table: the source model's table.
        kinds: mask kinds, of the table's kinds (hidden, head, intermediate) and layer, head_layer, mlp.
        target: kind -> open units in each row at the end; None for one total ``target_sparsity``.
        target_sparsity: fraction of the counted parameters to remove, where there is no target shape.
        start_sparsity: target at step 0. seed: of initial values and noise.
        constraint: ``lagrangian`` or ``exact``; exact needs a target shape, and there are no multipliers then.
        noise: scale of the sampled gates' noise; 0: gates without noise.

    Raises:
        ShearingError: unknown kinds, a target missing, unknown or out of range, or a constraint that cannot be kept.
    """

    def __init__(
        self,
        table: Table,
        kinds: list[str],
        target: Mapping[str, int] | None = None,
        target_sparsity: float | None = None,
        start_sparsity: float = 0.0,
        seed: int = 17,
        constraint: str = LAGRANGIAN,
        noise: float = 1.0,
    ) -> None:
        super().__init__()
        self.table, self.kinds, self.seed = table, list(kinds), seed
        self.constraint, self.noise = constraint, noise
        self.target = dict(target) if target is not None else None
        self.target_sparsity, self.start_sparsity = target_sparsity, start_sparsity
        self.shapes = {kind: self._shape(kind) for kind in self.kinds}
        self._check()
        generator = torch.Generator().manual_seed(seed)
        self.log_alpha = nn.ParameterDict()
        for kind in sorted(self.kinds):
            values = INITIAL_MEAN + INITIAL_STD * torch.randn(self.shapes[kind], generator=generator)
            self.log_alpha[kind] = nn.Parameter(hard_concrete.clamp(values))
        multipliers = self.kinds if target is not None else [TOTAL]
        multipliers = [] if self.exact else multipliers
        self.lambda_1 = nn.ParameterDict({kind: nn.Parameter(torch.zeros(1)) for kind in multipliers})
        self.lambda_2 = nn.ParameterDict({kind: nn.Parameter(torch.zeros(1)) for kind in multipliers})
        self.energy: Tensor | None
        self.register_buffer("energy", None)
        self.step, self.progress = 0, 0.0  # optimizer step; elapsed / warm-up: set before each batch

    @property
    def exact(self) -> bool:
        """Whether log alpha is shifted to the target, which leaves nothing to a penalty."""
        return self.constraint == EXACT

    def _shape(self, kind: str) -> tuple[int, ...]:
        if kind in BLOCK_KINDS:
            return (self.table.layers,)
        if kind not in self.table.kinds or kind == "vocab":
            known = sorted({*self.table.kinds, *BLOCK_KINDS} - {"vocab"})
            raise ShearingError(f"mask kind {kind!r} is unknown; the {self.table.family} family has {', '.join(known)}")
        return self.table.kinds[kind].shape(self.table.layers)

    def _check(self) -> None:
        if self.table.of_layer:
            raise ShearingError("learned masks need layers of one size: pad the model first (llmshearing.prune.pad)")
        if (self.target is None) == (self.target_sparsity is None):
            raise ShearingError("masks need either a target shape or target_sparsity, and not both")
        if self.target_sparsity is not None and not 0 <= self.target_sparsity < 1:
            raise ShearingError(f"target_sparsity is {self.target_sparsity}; it must be 0 or more and less than 1")
        if self.constraint not in (LAGRANGIAN, EXACT):
            raise ShearingError(f"constraint {self.constraint!r} is unknown; there are {LAGRANGIAN} and {EXACT}")
        if self.exact and self.target is None:
            raise ShearingError("constraint exact needs a target shape; target_sparsity alone goes with lagrangian")
        if not 0 <= self.noise < float("inf"):
            raise ShearingError(f"noise is {self.noise}; it must be 0 or more")
        untrained = sorted(set(self.target or ()) - set(self.kinds))
        if untrained:
            raise ShearingError(f"the target names {', '.join(untrained)}, of which there is no mask")
        for kind in self.kinds:
            size = self.row_size(kind)
            if self.target is not None and not 0 < self.target.get(kind, 0) <= size:
                raise ShearingError(f"target of mask {kind!r} is {self.target.get(kind)}; it must be 1 to {size}")

    def row_size(self, kind: str) -> int:
        return self.table.layers if kind in BLOCK_KINDS else self.table.kinds[kind].size

    def rows(self, kind: str, values: Tensor) -> Tensor:
        """View values of a kind as [..., N]: one row for each target."""
        return values.unflatten(-1, (-1, self.row_size(kind)))

    # Gates -------------------------------------------------------------------------------------------------------

    def sample(self) -> dict[str, Tensor]:
        """Gates of this step, with a gradient to log alpha; the same in every microbatch and on every rank."""
        return {
            kind: hard_concrete.sample(
                a,
                hard_concrete.uniform_noise(tuple(a.shape), seed=self.seed, step=self.step, kind=kind, like=a),
                self.noise,
            )
            for kind, a in self.log_alpha.items()
        }

    @torch.no_grad()
    def deterministic(self, to_target: bool) -> dict[str, Tensor]:
        """Gates without noise, sized by the target shape or by what the masks now expect to be open."""
        if to_target and self.target is None:
            raise ShearingError("these masks have no target shape (target_sparsity only): size them by the masks")
        return {
            kind: hard_concrete.deterministic(
                self.rows(kind, a), self.target[kind] if to_target and self.target else None
            ).reshape(a.shape)
            for kind, a in self.log_alpha.items()
        }

    def selection(self, gates: Mapping[str, Tensor], round_to: int = 1) -> Selection:
        """The selection of these gates (:func:`selection_from_gates`), with the norms' energy where it is known."""
        selection = selection_from_gates(self.table, gates, round_to)
        if self.energy is None or HIDDEN not in selection.units:
            return selection
        return replace(selection, energy=dict(zip(energy_norms(self.table), self.energy, strict=True)))

    def count_energy(self, shares: Mapping[str, Tensor] | None) -> None:
        """From now on norms count the energy of open hidden units; None: their number.

        Args:
            shares: name of each of :func:`energy_norms` -> share [d] of each unit; of no other norm.
        """
        if shares is None:
            self.energy = None
            return
        rows = [shares[name] for name in energy_norms(self.table)]
        parameter = next(self.parameters())
        self.energy = torch.stack(rows).to(parameter.device, parameter.dtype)

    # Penalty -----------------------------------------------------------------------------------------------------

    def sparsity(self) -> dict[str, Tensor]:
        """Expected sparsity of every row of every kind."""
        return {
            kind: 1 - self.rows(kind, hard_concrete.probability_open(a)).mean(-1) for kind, a in self.log_alpha.items()
        }

    def expected_parameters(self) -> Tensor:
        """Expected number of counted parameters, a scalar with gradient."""
        probability = {kind: hard_concrete.probability_open(a) for kind, a in self.log_alpha.items()}
        return expected_parameters(self.table, probability)

    def target_parameters(self) -> float:
        """Counted parameters of the target."""
        if self.target is None:
            return self.table.count(counted_only=True) * (1 - (self.target_sparsity or 0.0))
        shares = {kind: number / self.row_size(kind) for kind, number in self.target.items()}
        full = {kind: torch.full(self.shapes[kind], share, dtype=torch.float64) for kind, share in shares.items()}
        return expected_parameters(self.table, full).item()

    def targets_now(self) -> dict[str, float]:
        """Target sparsity of every pair of multipliers at the current progress."""
        if self.target is None:
            final = {TOTAL: float(self.target_sparsity or 0.0)}
        else:
            final = {kind: 1 - number / self.row_size(kind) for kind, number in self.target.items()}
        return {kind: lagrangian.target_now(value, self.start_sparsity, self.progress) for kind, value in final.items()}

    def penalty(self, ascending: bool = True) -> Tensor:
        """The Lagrangian term at the current progress, a scalar; 0 under the exact constraint.

        ascending: turn the multipliers' gradients round, so that the one descending optimizer ascends on them.
        """
        if self.target is None:
            sparsity = {TOTAL: 1 - self.expected_parameters() / self.table.count(counted_only=True)}
        else:
            sparsity = self.sparsity()
        total = torch.zeros((), device=next(self.parameters()).device)
        targets = {} if self.exact else self.targets_now()
        for kind, target in targets.items():
            first, second = self.lambda_1[kind], self.lambda_2[kind]
            if ascending:
                first, second = lagrangian.ascend(first), lagrangian.ascend(second)
            total = total + lagrangian.penalty(sparsity[kind].to(first.dtype), target, first, second)
        return total

    @torch.no_grad()
    def project(self) -> None:
        """Put log alpha back into its range. Outside of it the gradient is 0, and a step of size 1 overshoots."""
        for a in self.log_alpha.values():
            a.clamp_(hard_concrete.LOG_ALPHA_MIN, hard_concrete.LOG_ALPHA_MAX)

    @torch.no_grad()
    def hold(self) -> None:
        """Shift every row so that it expects exactly its target at the current progress to be open (`masks.exact`)."""
        for kind, target in self.targets_now().items():
            a = self.log_alpha[kind]
            size = self.row_size(kind)
            a.copy_(shifted(self.rows(kind, a), size * (1 - target)).reshape(a.shape))


def no_energy(table: Table) -> dict[str, Tensor]:
    """Shares to be filled from a checkpoint."""
    return {name: torch.zeros(table.axes[HIDDEN].length) for name in energy_norms(table)}


def energy_norms(table: Table) -> list[str]:
    """Names of the weights of the norms that can count energy, in the order of the rows of ``L0Masks.energy``."""
    norms = [spec for spec in stream_norms(table) if spec.module.form == "rms_norm"]
    return [name for name, spec, _ in table.instances() if spec in norms]


def expected_parameters(table: Table, probability: Mapping[str, Tensor]) -> Tensor:
    """Expected size of the counted tensors: products of expected open counts along their axes.

    Args:
        probability: mask kind -> of every unit that it is open, full size; an absent kind is all open.

    Returns:
        float64 scalar, with gradient.
    """
    rows = {
        kind: p if table.kinds[kind].rows is None else p.unflatten(-1, (table.kinds[kind].rows, -1))
        for kind, p in probability.items()
        if kind not in BLOCK_KINDS
    }
    counts = {kind: p.sum(-1) for kind, p in rows.items()}  # of each row: [] or [L, rows]
    blocks = block_product(probability)
    device = next(iter(probability.values())).device if probability else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for spec in table.tensors:
        if not spec.counted or spec.alias is not None:
            continue
        experts = range(table.kinds[EXPERT].size) if spec.stacked else (spec.expert,)
        for expert in experts:
            factor: Tensor | float = blocks.get(spec.block, 1.0) if spec.block else 1.0
            if expert is not None and EXPERT in probability:
                factor = factor * probability[EXPERT][:, expert]
            for dimension in spec.matrix:
                factor = factor * _expected_length(table, dimension, counts, expert)
            size = torch.as_tensor(factor)
            size = size.expand(table.layers) if spec.per_layer else size
            total = total + (size if spec.layers is None else size[list(spec.layers)]).sum()
    return total


def _expected_length(
    table: Table, dimension: Dimension, counts: Mapping[str, Tensor], expert: int | None
) -> Tensor | float:
    """Expected open elements of a dimension, a scalar or [L]."""
    total: Tensor | float = 0.0
    for name in axes_of(dimension):
        axis = table.axes[name]
        if axis.kind is None or axis.kind not in counts:
            total = total + axis.length
            continue
        number = counts[axis.kind]
        if number.dim():
            number = number[:, expert] if axis.of_expert and expert is not None else number.sum(-1)
        total = total + number * axis.per_unit
    return total


def block_product(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """block -> product [L] of the gates (or probabilities) of all mask kinds on it."""
    product: dict[str, Tensor] = {}
    for kind, blocks in BLOCK_KINDS.items():
        for block in blocks if kind in gates else ():
            product[block] = product[block] * gates[kind] if block in product else gates[kind]
    return product


def selection_from_gates(table: Table, gates: Mapping[str, Tensor], round_to: int = 1) -> Selection:
    """The selection that full-size gates describe; a gate of exactly 0 closes its unit.

    Where rows of one layer must stay equally long (query heads inside KV groups), and where ``round_to`` asks for
    multiples of so many elements on each axis, closed units are added with gate 0: the function is the same and the
    shapes are legal, or quicker to multiply. Norms must not count the padding of hidden units: a gated model does not,
    and fold refuses it.

    Args:
        gates: mask kind -> its shape in :meth:`Kind.shape`; layer, head_layer, mlp: [L].
    """
    kinds = [kind for kind in gates if kind not in BLOCK_KINDS]
    blocks = block_product(gates)
    # One transfer from the device for everything that decides shapes, and one back for the indices.
    is_open = _open_on_cpu({**{kind: gates[kind] for kind in kinds}, **blocks})
    kept, padding = {}, {}
    for kind in kinds:
        rows = table.kinds[kind].rows
        open_rows = is_open[kind].view(table.layers if rows else 1, rows or 1, -1)
        kept[kind] = _filled(open_rows, table.multiple(kind, round_to), table.kinds[kind].minimum).flatten(1)
        padding[kind] = (kept[kind].sum(-1) - open_rows.sum((1, 2))).tolist()
    places = _places(kept, gates)
    units = {kind: _units(kind, gates[kind], kept[kind], places[kind], padding[kind]) for kind in kinds}
    return Selection(units, blocks, known_open={block: is_open[block].tolist() for block in blocks})


def _open_on_cpu(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """name -> which gates are not 0, flat."""
    if not gates:
        return {}
    flat = torch.cat([gate.detach().flatten() for gate in gates.values()]).ne(0).cpu()
    return dict(zip(gates, flat.split([gate.numel() for gate in gates.values()]), strict=True))


def _filled(is_open: Tensor, multiple: int, minimum: int) -> Tensor:
    """Open units, and the first closed ones of each row that is shorter than its layer's fullest, rounded up.

    is_open, result: bool [layers, rows, N]. minimum: units that each row has at least.
    """
    number = is_open.sum(-1, keepdim=True)
    width = number.amax(1, keepdim=True).clamp(min=minimum)
    width = (width + multiple - 1) // multiple * multiple
    closed = is_open.logical_not()
    return is_open | (closed & (closed.cumsum(-1) <= width - number))


def _places(kept: Mapping[str, Tensor], gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kind -> [2, n]: the place of each kept unit in its layer and in the kind's flat vector, on the gates' device."""
    if not kept:
        return {}
    inside = torch.cat([mask.nonzero()[:, 1] for mask in kept.values()])
    flat = torch.cat([mask.flatten().nonzero()[:, 0] for mask in kept.values()])
    places = torch.stack([inside, flat]).to(next(iter(gates.values())).device)
    return dict(zip(kept, places.split([int(mask.sum()) for mask in kept.values()], dim=1), strict=True))


def _units(kind: str, gate: Tensor, kept: Tensor, places: Tensor, padding: list[int]) -> tuple[Units, ...]:
    """Units of a kind, layer by layer. gate: full size; kept: bool [layers, rows * N] on the CPU; places: [2, n]."""
    counts = kept.sum(-1).tolist()
    inside, flat = places
    values = gate.flatten().index_select(0, flat)
    # Experts are modules: their numbers are needed one by one, those of other units never are.
    known = [tuple(row.nonzero()[:, 0].tolist()) if kind == EXPERT else None for row in kept]
    return tuple(map(Units, inside.split(counts), values.split(counts), padding, known))


def final_gates(masks: L0Masks, uniform: bool = False) -> dict[str, Tensor]:
    """Gates to fold with: of exactly the target shape, or, where there is none, sized by the masks.

    uniform: with sizes by the masks, give every kept layer the rounded mean of the kept layers' sizes.
    """
    if masks.target is not None:
        return masks.deterministic(to_target=True)
    gates = masks.deterministic(to_target=False)
    kept = masks.selection(gates).kept_layers(masks.table.layers)
    for kind in gates if uniform and kept else ():
        if kind not in BLOCK_KINDS and masks.table.kinds[kind].rows is not None:
            sizes = masks.rows(kind, gates[kind])[kept].ne(0).sum(-1)  # [kept layers, rows]
            size = max(1, round(sizes.double().mean().item()))
            log_alpha = masks.log_alpha[kind].detach()
            gates[kind] = hard_concrete.deterministic(masks.rows(kind, log_alpha), size).reshape(log_alpha.shape)
    return gates


def final_selection(masks: L0Masks, *, uniform: bool = False, zero_closed_blocks: bool = False) -> Selection:
    """The selection that a pruning run ends in, checked to fold to one uniform shape: the target, where there is one.

    Raises:
        ShearingError: naming the layers or sizes that stand against it.
    """
    selection = masks.selection(final_gates(masks, uniform))
    if not zero_closed_blocks:
        check_foldable(masks.table, selection)
    try:
        shape = folded_shape(masks.table, selection)
    except ShearingError as error:
        raise ShearingError(f"{error}. --uniform gives every layer the mean size") from error
    _check_shape(masks, shape, zero_closed_blocks)
    return selection


def _check_shape(masks: L0Masks, shape: Mapping[str, int], zero_closed_blocks: bool) -> None:
    problems = [f"{key} would be 0" for key, size in shape.items() if size == 0]
    units = masks.table.units(shape)
    for kind, target in (masks.target or {}).items():
        size = shape[masks.table.layers_key] if kind in BLOCK_KINDS else units[kind]
        if size != target and not (kind in BLOCK_KINDS and zero_closed_blocks):
            problems.append(f"mask {kind!r} keeps {size}, its target is {target}")
    if problems:
        raise ShearingError("the masks do not fold to a model: " + "; ".join(problems))
